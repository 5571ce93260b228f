"""The sites of an engine's model: where its MoE blocks are, and what they compute."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.platforms import current_platform

from moe_surgery.engine.model.lens import readable
from moe_surgery.engine.model.routed import Routed, routed_layers
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
    block as it was read. ``bare`` is a block that couldn't be read, and has nothing but a router beside that layer.
    ``elsewhere`` is another name of something in the block, outside of it, and ``sibling`` a shared expert beside it.
    """

    site: Site
    reading: Reading | None = None
    routed: Routed | None = None
    unread: str | None = None
    structure: Hashable = None
    bare: bool = False
    elsewhere: str | None = None
    sibling: str | None = None

    @property
    def swapped(self) -> bool:
        return self.reading is None and self.unread is None


def survey(model: nn.Module) -> tuple[EngineSite, ...]:
    """Every site of ``model`` in the order of its module tree, read. Sites of one structure are read once."""
    known = Readings()
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module._parameters:
            names.setdefault(module, []).append(path)
    return tuple(
        replace(_survey(site, known), elsewhere=_elsewhere(site, names), sibling=_sibling(model, site))
        for site in _sites(model)
    )


def _sibling(model: nn.Module, site: Site) -> str | None:
    """The module beside a block that is named a shared expert, and holds weights."""
    parent = site.path.rpartition(".")[0]
    beside = model.get_submodule(parent).named_children()
    return next(
        (
            name
            for name, child in beside
            if child is not site.module and name.startswith("share") and next(child.parameters(), None) is not None
        ),
        None,
    )


def _elsewhere(site: Site, names: Mapping[nn.Module, Sequence[str]]) -> str | None:
    """A name outside of a block of one of its modules that hold weights."""
    found = (path for module in site.module.modules() for path in names.get(module, ()))
    return next((path for path in found if not _within(path, site.path)), None)


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
            if reading.spare:
                raise Unreadable(f"{min(reading.spare)} takes no part in what was read")
            if reading.above_zero is not None:
                raise Unreadable("in an engine, experts outside of the groups must not be ranked")
    except Unreadable as error:
        return EngineSite(site, unread=str(error), bare=_bare(block))
    return EngineSite(site, _as_routed(reading, seen.routed), seen.routed, structure=key)


def _bare(block: nn.Module) -> bool:
    """Whether a block is one routed layer of vLLM's, and beside it at most what scores its experts, [n, H] and [n]."""
    routed = routed_layers(block)
    if len(routed) != 1:
        return False
    runner = routed[0][1]
    inside = {id(parameter) for parameter in runner.parameters()}
    beside = [parameter for parameter in block.parameters() if id(parameter) not in inside]
    config = runner.moe_config
    # Zero experts are scored too.
    scored = {parameter.shape[0] if parameter.ndim else 0 for parameter in beside}
    matrices = [parameter for parameter in beside if parameter.ndim > 1]
    return (
        len(scored) <= 1
        and all(config.num_logical_experts <= count <= 2 * config.num_logical_experts for count in scored)
        and len(matrices) <= 1
        and all(matrix.ndim == 2 and matrix.shape[1] == config.hidden_dim_unpadded for matrix in matrices)
    )


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
