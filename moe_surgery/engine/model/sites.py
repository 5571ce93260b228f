"""The sites of an engine's model: where its MoE blocks are, and what they compute."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from torch import nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.platforms import current_platform

from moe_surgery.engine.model.lens import readable
from moe_surgery.engine.model.routed import Routed
from moe_surgery.errors import SurgeryError
from moe_surgery.models.site import Site
from moe_surgery.models.tree import find_sites
from moe_surgery.read.block import read
from moe_surgery.read.reading import Reading, Unreadable
from moe_surgery.read.sameness import Readings, structure
from moe_surgery.read.unrecorded import check_site
from moe_surgery.spec import Precision
from moe_surgery.targets.base import SwappedBlock


@dataclass(frozen=True, eq=False)
class EngineSite:
    """A site with what was read there, or why it could not be read; neither where vLLM's layer holds it all already.

    ``routed`` is vLLM's routed layer in the block, None for a block that makes do without. ``structure`` is that of the
    block as it was read.
    """

    site: Site
    reading: Reading | None = None
    routed: Routed | None = None
    unread: str | None = None
    structure: Hashable = None

    @property
    def swapped(self) -> bool:
        return self.reading is None and self.unread is None


def survey(model: nn.Module) -> tuple[EngineSite, ...]:
    """Every site of ``model`` in the order of its module tree, read. Sites of one structure are read once."""
    known = Readings()
    return tuple(_survey(site, known) for site in _sites(model))


def _sites(model: nn.Module) -> list[Site]:
    """The modules that hold a routed layer of vLLM's, and those that look like MoE blocks without one."""
    modules = dict(model.named_modules())
    runners = [path for path, module in modules.items() if isinstance(module, MoERunner)]
    blocks = {path.rpartition(".")[0] for path in runners}
    for site in find_sites(model):
        if not any(_within(site.path, other) or _within(other, site.path) for other in (*blocks, *runners)):
            blocks.add(site.path)
    return [Site(path, module) for path, module in modules.items() if path in blocks]


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _survey(site: Site, known: Readings) -> EngineSite:
    block = site.module
    if isinstance(block, SwappedBlock) or any(
        isinstance(module, MoERunner) and module.shared_experts is not None for module in block.modules()
    ):
        return EngineSite(site)
    try:
        with readable(block) as seen:
            check_site(block)
            key = structure(block, site.path, seen.meanings)
            reading = known.once(key, lambda: read(block))
            if not reading.calling.plain or reading.results is not None:
                raise Unreadable("in an engine, blocks take and return one tensor")
    except Unreadable as error:
        return EngineSite(site, unread=str(error))
    return EngineSite(site, _as_routed(reading, seen.routed), seen.routed, structure=key)


def check_unchanged(item: EngineSite) -> None:
    """Raise :class:`SurgeryError` if a block isn't the one that was read: its model may have changed it since."""
    try:
        with readable(item.site.module) as seen:
            same = structure(item.site.module, item.site.path, seen.meanings) == item.structure
    except Unreadable:
        same = False
    if not same:
        raise SurgeryError(f"{item.site.path}: the block was changed after it was read, while its weights were loaded")


def _as_routed(reading: Reading, routed: Routed | None) -> Reading:
    """The reading with the routing that vLLM's layer really does in place of the one that the lens showed."""
    if routed is None or routed.routes == "given":
        return reading
    router = reading.spec.router
    if routed.routes == "own":
        router = replace(router, scoring="own", renormalize=False, weights_dtype="float32")
    else:
        # vLLM takes and ranks the softmax of the logits' dtype on CPU, and of float32 on a GPU.
        kept: Precision = "native" if current_platform.is_cpu() else "float32"
        router = replace(router, scores_dtype=kept, weights_dtype="float32", ranks="scores", ranked_dtype=kept)
    return replace(reading, spec=replace(reading.spec, router=router))
