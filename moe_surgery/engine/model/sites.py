"""The sites of an engine's model: where its MoE blocks are, and what they compute."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.platforms import current_platform

from moe_surgery.engine.model.lens import readable
from moe_surgery.engine.model.routed import Routed, routed_layers, shared_inside
from moe_surgery.errors import SurgeryError
from moe_surgery.models.site import Site
from moe_surgery.models.tree import find_sites, takes_one
from moe_surgery.planning.surroundings import around, reached
from moe_surgery.read.beside import Pair, beside
from moe_surgery.read.block import read
from moe_surgery.read.reading import Reading, Unreadable
from moe_surgery.read.sameness import Readings, structure
from moe_surgery.read.unrecorded import check_site
from moe_surgery.spec import Precision
from moe_surgery.targets.base import SwappedBlock


@dataclass(frozen=True, eq=False)
class Around:
    """The layer that adds its child ``sibling`` to a block, and its structure when it was recorded."""

    module: nn.Module
    path: str
    sibling: str
    structure: Hashable


@dataclass(frozen=True, eq=False)
class EngineSite:
    """A site with what was read there, or why it could not be read; neither where that wasn't asked.

    ``routed`` is vLLM's routed layer in the block, None for a block that makes do without. ``stored`` are the methods
    by which layers in it hold quantised weights: what it computes is known of its parts alone then. ``structure`` is
    that of the block as it was read. ``bare`` is a block that couldn't be read, and has nothing but a router beside
    that layer. ``elsewhere`` is another name of something in the block, outside of it. ``pair`` is what was read where
    a shared expert stands beside the block in its ``layer``, and ``alone`` the site without it; ``remark`` says why it
    stays there, if there may be one, or why a fused block couldn't be read.
    """

    site: Site
    reading: Reading | None = None
    routed: Routed | None = None
    unread: str | None = None
    stored: tuple[str, ...] = ()
    structure: Hashable = None
    fused: bool = False
    bare: bool = False
    elsewhere: str | None = None
    pair: Pair | None = None
    layer: Around | None = None
    alone: EngineSite | None = None
    remark: str = ""

    @property
    def swapped(self) -> bool:
        return self.reading is None and self.unread is None

    @property
    def whole(self) -> bool:
        """Whether vLLM's layer computes all of the block: it routes, and adds the shared expert, if there is one."""
        if self.reading is None or self.routed is None:
            return self.fused
        return self.fused or (self.reading.spec.shared is None and self.routed.routes != "given")

    @property
    def block(self) -> nn.Module:
        """What was read, to which all paths in the reading are relative: the site's module, or that and its sibling."""
        return self.pair or self.site.module

    @property
    def experts(self) -> Any:
        """vLLM's routed experts, in a block that has some."""
        assert self.routed is not None
        return self.routed.runner.routed_experts

    @property
    def place(self) -> str:
        """The path in the model of what was read: of the block, or of its layer."""
        return self.site.path if self.pair is None else self.site.path.rpartition(".")[0]

    def places(self) -> dict[str, nn.Module]:
        """The modules in the model that are read as one, by path: the block first."""
        if self.pair is None:
            return {self.site.path: self.site.module}
        return {f"{self.place}.{name}".lstrip("."): module for name, module in self.pair.named_children()}

    def inside(self, path: str) -> str:
        """A path in what was read, relative to the site's module, in which it lies."""
        return path if self.pair is None else path.partition(".")[2]


def survey(model: nn.Module, *, fused: bool) -> tuple[EngineSite, ...]:
    """Every site of ``model`` in the order of its module tree, read. Sites of one structure are read once.

    Blocks that vLLM has fused are read too if that is asked.
    """
    known = Readings()
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    layers = _Layers(model)
    items = (
        EngineSite(site, fused=True) if _fused(site.module) and not fused else _survey(site, site.module, known)
        for site in engine_sites(model)
    )
    settled = (_with_sibling(layers, item, known) for item in items)
    return tuple(replace(item, elsewhere=_elsewhere(model, item, names)) for item in settled)


class _Layers:
    """The layers around a model's blocks: what each adds to a block. Those of one structure are recorded once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[Hashable, str | Unreadable | None] = {}

    def beside(self, path: str, name: str) -> str | None:
        """The child that the layer at ``path`` adds to its child ``name``, if there is one.

        Raises :class:`Unreadable` where that can't be told, or if code around the layer may ask one of them alone.
        """
        layer = self.model.get_submodule(path)
        key = name, _layer_structure(layer, path)
        if key not in self._known:
            try:
                self._known[key] = beside(layer, name)
            except Unreadable as error:
                self._known[key] = Unreadable(str(error))  # anew, as the frames of this one keep modules alive
        other = self._known[key]
        if isinstance(other, Unreadable):
            raise Unreadable(str(other))
        if other is not None and (told := _names_either(self.model, path, {name, other})) is not None:
            raise Unreadable(f"it adds {other} to it, but {told}")
        return other


def _with_sibling(layers: _Layers, item: EngineSite, known: Readings) -> EngineSite:
    """The site of a block without a shared expert, read again with what its layer adds to it, if that is one."""
    parent, _, name = item.site.path.rpartition(".")
    layer = layers.model.get_submodule(parent)
    if not (item.bare or (item.reading and not item.reading.spec.shared)) or not _is_layer(layer):
        return item
    try:
        other = layers.beside(parent, name)
    except Unreadable as error:
        return replace(item, remark=f"its layer: {error}")
    if other is None:
        return item
    pair = Pair(name, item.site.module, other, layer.get_submodule(other))
    both = _survey(item.site, pair, known)
    if both.reading is None:
        return replace(item, remark=f"its layer adds {other} to it, which can't be read with it: {both.unread}")
    if both.reading.spec.shared is None:
        return replace(item, remark=f"its layer adds {other} to it, which is no shared expert")
    around_it = Around(layer, parent, other, _layer_structure(layer, parent))
    return replace(both, pair=pair, layer=around_it, alone=item)


def _layer_structure(layer: nn.Module, path: str) -> Hashable:
    """That of a layer alone: what its children are makes no difference to what it does with their answers."""
    return structure(layer, path, {module: () for module in layer.modules() if module is not layer})


def _is_layer(module: nn.Module) -> bool:
    """Whether a module calls its children itself."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.Sequential)


def _names_either(model: nn.Module, layer: str, names: set[str]) -> str | None:
    """What around a layer may ask one of its children by itself, as far as names in the code tell."""
    for path in around(layer):
        module = model.get_submodule(path)
        own = {name for name in names if hasattr(module, name)}
        if used := sorted((names - own) & reached(module)):
            return f"the forward of {path or 'the model'} names {', '.join(used)}"
    return None


def _elsewhere(model: nn.Module, item: EngineSite, names: Mapping[nn.Module, Sequence[str]]) -> str | None:
    """A name outside of a block of one of its modules that hold weights.

    Where what the block stands in has several names, as a model has that is an attribute twice, so has the block: it
    is exchanged under all of them.
    """
    places: list[str] = []
    for place in item.places():
        parent, _, name = place.rpartition(".")
        places += (f"{path}.{name}".lstrip(".") for path in names[model.get_submodule(parent)])
    weights = (module for part in item.places().values() for module in part.modules() if module._parameters)
    found = (path for module in weights for path in names[module])
    return next((path for path in found if not any(within(path, place) for place in places)), None)


def engine_sites(model: nn.Module) -> list[Site]:
    """The modules that hold a routed layer of vLLM's, and those that look like MoE blocks without one.

    A decoder layer that calls a routed layer itself, and takes more than one tensor, is no block; the site is that one.
    """
    modules = dict(model.named_modules())
    runners = [path for path, module in modules.items() if isinstance(module, MoERunner)]
    parents = {path: path.rpartition(".")[0] for path in runners}
    blocks = {parent if takes_one(modules[parent]) else path for path, parent in parents.items()}
    for site in find_sites(model):
        clear = not any(within(site.path, other) or within(other, site.path) for other in (*blocks, *runners))
        if site.sure and clear:
            blocks.add(site.path)
    return [Site(path, module) for path, module in modules.items() if path in blocks]


def within(path: str, outer: str) -> bool:
    """Whether ``path`` is that of the module at ``outer``, or of one inside of it."""
    return path == outer or path.startswith(f"{outer}.")


def _survey(site: Site, block: nn.Module, known: Readings) -> EngineSite:
    if isinstance(site.module, SwappedBlock):
        return EngineSite(site, fused=True)
    fused = _fused(block)
    try:
        with readable(block) as seen:
            check_site(block)
            key = structure(block, site.path, seen.meanings)
            reading = known.once(key, lambda: read(block))
            if not reading.calling.plain or reading.results is not None or reading.program is not None:
                raise Unreadable("in an engine, blocks take and return one tensor")
            if reading.spare:
                raise Unreadable(f"{min(reading.spare)} takes no part in what was read")
            if reading.above_zero is not None:
                raise Unreadable("in an engine, experts outside of the groups must not be ranked")
            if fused and reading.spec.shared is None:
                raise Unreadable("what vLLM's layer computes beside its experts is no shared expert")
    except Unreadable as error:
        if fused:
            return EngineSite(site, fused=True, remark=str(error))
        return EngineSite(site, unread=str(error), bare=_bare(site.module))
    routed = _as_routed(reading, seen.routed)
    return EngineSite(site, routed, seen.routed, stored=seen.stored, structure=key, fused=fused)


def _fused(block: nn.Module) -> bool:
    """Whether a routed layer of vLLM's in it computes a shared expert too."""
    return any(shared_inside(runner) is not None for _, runner in routed_layers(block))


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
        with readable(item.block) as seen:
            check_site(item.block)
            same = structure(item.block, item.site.path, seen.meanings) == item.structure
        if item.layer is not None:
            same &= _layer_structure(item.layer.module, item.layer.path) == item.layer.structure
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
