"""Walking a model's module tree for places that look like sparse-MoE blocks.

Looking is generous and decides nothing: a place is a site if it holds a bank of experts, told by structure. Whether it
is a block that can be replaced is for reading to say; what can't be read is reported as missed, never passed over.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from types import MethodType

from torch import Tensor, nn

from moe_surgery.models.adapters import own_parameters
from moe_surgery.models.chosen import chooses_heads, chosen_by
from moe_surgery.models.site import Site
from moe_surgery.models.wide import HINT, around_stacked, around_wide, matrices, outwards, wide_layers
from moe_surgery.targets.base import SwappedBlock

_LEVELS = 3  # from a bank up to what routes to it
_MOST_MATRICES = 6  # of one expert; a list of whole layers isn't a list of experts


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of ``model`` in the order of its module tree; blocks swapped in before are sites too."""
    modules = dict(model.named_modules())
    paths = {path for path, module in modules.items() if isinstance(module, SwappedBlock)}
    unsure, told, chosen = set[str](), set[str](), dict[str, str]()
    for path, module in modules.items():
        if not any(path == done or path.startswith(f"{done}.") for done in paths):
            called = HINT in path.rpartition(".")[2].lower()
            found = _around_banks(modules, path, called)
            images = {} if found else _around_banks(modules, path, called, over_places=True)
            paths |= found.keys() | {place for place, certain in images.items() if certain}
            unsure |= images.keys()
            around, certain = around_stacked(modules, path)
            told |= {path} if _told_apart(modules, path) else set()
            how = chosen_by(module, _equal_mlps(module, over_places=False)) or chooses_heads(module)
            if how is not None:
                chosen[path] = how
            wide, surely = wide_layers(module)
            unsure |= {outer for outer in [path.rpartition(".")[0]] if path and around_wide(modules[outer], module)}
            paths |= (around if certain else set()) | ({path} if wide and surely else set())
            may_be = wide or _by_another(module, modules.values()) or _two_beside(module)
            unsure |= around | ({path} if may_be else set())
    unsure = {path for path in unsure - paths if takes_one(modules[path])}
    paths |= {path for path in unsure if not any(_inside(other, path) for other in paths)}
    paths |= {path for path in told if not any(_inside(path, other) for other in paths)}
    chosen = {path: how for path, how in chosen.items() if not any(_inside(path, other) for other in paths)}
    paths |= chosen.keys()
    inner = {path for path in paths if not any(other != path and _inside(other, path) for other in paths)}
    return tuple(
        Site(path, module, path not in unsure, chosen.get(path)) for path, module in modules.items() if path in inner
    )


def _by_another(module: nn.Module, tree: Iterable[nn.Module]) -> bool:
    """Whether a module's forward was exchanged for that of a module that the model doesn't hold, as adapters do."""
    lent = vars(module).get("forward")
    owner = lent.__self__ if isinstance(lent, MethodType) else None
    return isinstance(owner, nn.Module) and not any(owner is one for one in tree)


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.") if outer else True


def _around_banks(modules: dict[str, nn.Module], path: str, called: bool, over_places: bool = False) -> dict[str, bool]:
    """What routes to the banks of experts that a module holds directly, and whether it is certain that they are.

    Convolutions ``over_places`` count if that is asked.
    """
    places: dict[str, bool] = {}
    for bank in _banks(modules[path], called, over_places):
        place = _block_path(modules, path, *bank, over_places)
        if place is not None:
            places[place] = places.get(place, False) or bank[-1]
    return places


def _banks(module: nn.Module, called: bool, over_places: bool) -> Iterator[tuple[tuple[str, ...], int, bool]]:
    """Banks of experts that ``module`` holds directly: ``(names of its children, number of experts, certain)``.

    No name means stacked tensors of the module's own. A bank is one list of MLPs, several lists of single layers or of
    matrices, or equal MLPs side by side; a list that is called experts may hold one. One that isn't certain is a bank
    only where something scores as many experts. ``called`` says that the module's own name is one for experts.
    """
    named_so = HINT in type(module).__name__.lower()
    if not isinstance(module, nn.modules.conv._ConvNd):
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        own = [p for p in held if p.ndim in (3, 4) and min(p.shape[-2:]) > 1]
        stacked = Counter(p.shape[0] for p in own if p.shape[0] > 1 or named_so)
        for count, times in stacked.items():
            yield (), count, times > 1 or named_so
    tables = Counter(child.weight.shape for child in module.children() if isinstance(child, nn.Embedding))
    if max(tables.values(), default=0) > 1 and any(isinstance(child, nn.Linear) for child in module.children()):
        yield (), 0, True  # experts of one row each, looked up by number
    grouped = Counter(child.groups for child in module.children() if isinstance(child, nn.modules.conv._ConvNd))
    for count, times in grouped.items():
        if count > 1 < times and not _depthwise(module, count):
            yield (
                tuple(name for name, child in module.named_children() if getattr(child, "groups", 1) == count),
                count,
                False,
            )
    singles: dict[int, tuple[str, ...]] = {}
    for name, child in module.named_children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            count = sum(1 for _ in child.parameters())
            if count > 1 and count == len(matrices(child)):
                singles[count] = (*singles.get(count, ()), name)
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            members = [member for member in child.children() if any(True for _ in member.parameters())]
            counts = [len(matrices(member, over_places)) for member in members]
            named = HINT in name.lower() and not isinstance(child, nn.Sequential)
            if len(members) < (1 if named else 2) or min(counts) < 1:
                continue
            if max(counts) > _MOST_MATRICES and not named:
                continue
            if isinstance(child, nn.Sequential) and len(set(map(_form, members))) > 1:
                continue
            if named or min(counts) >= 2:
                yield (name,), len(members), named
            elif max(counts) == min(counts) == 1:
                singles[len(members)] = (*singles.get(len(members), ()), name)
    for count, names in singles.items():
        if len(names) > 1:
            yield names, count, called
    for names in _side_by_side(module, over_places):
        yield names, len(names), False


def _depthwise(module: nn.Module, groups: int) -> bool:
    """Whether convolutions in so many ``groups`` have one channel in each."""
    layers = [child for child in module.children() if isinstance(child, nn.modules.conv._ConvNd)]
    return any(layer.groups == groups == layer.in_channels for layer in layers)


def _side_by_side(module: nn.Module, over_places: bool) -> Iterator[tuple[str, ...]]:
    """The names of children that are equal MLPs: at least three, or two that are called experts."""
    for names in _equal_mlps(module, over_places):
        if len(names) > 2 or (len(names) == 2 and all(HINT in name.lower() for name in names)):
            yield tuple(names)


def _equal_mlps(module: nn.Module, over_places: bool) -> Iterator[tuple[str, ...]]:
    """The names of children that are equal MLPs."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return
    alike: dict[Hashable, list[str]] = {}
    for name, child in module.named_children():
        if 2 <= len(matrices(child, over_places)) <= _MOST_MATRICES:
            alike.setdefault((type(child), _form(child)), []).append(name)
    yield from map(tuple, alike.values())


def _told_apart(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether a module says that it is of experts and holds equal MLPs alone, of which a mask, say, chooses one.

    One of a list is an expert itself.
    """
    module, around = modules[path], modules.get(path.rpartition(".")[0])
    if HINT not in type(module).__name__.lower() or isinstance(around, (nn.ModuleList, nn.ModuleDict)):
        return False
    several = [names for names in _equal_mlps(module, over_places=False) if len(names) > 1]
    return any(not any(True for _ in _beside(module, *names)) for names in several) and _called_itself(module)


def _called_itself(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _two_beside(module: nn.Module) -> bool:
    """Whether ``module`` holds two equal MLPs, and a layer that may weigh them."""
    pairs = _equal_mlps(module, over_places=False)
    return any(len(names) == 2 and any(_scores(module, n, names) for n in (1, 2)) for names in pairs)


def _form(module: nn.Module) -> Hashable:
    """The shapes of a module's parameters, by name."""
    return tuple((name, parameter.shape) for name, parameter in own_parameters(module))


def _scores(module: nn.Module, count: int, without: tuple[str, ...], over_places: bool = False) -> bool:
    """Whether ``module`` holds, outside its children ``without``, a matrix with one row or column per expert.

    A convolution ``over_places`` is one too, if that is asked and it gives a channel per expert.

    Biases of stacked experts are such matrices too, but nothing to route with.
    """
    skip = tuple(f"{name}." for name in without)
    named = (*own_parameters(module), *module.named_buffers())
    beside = [tensor for name, tensor in named if "bias" not in name and not name.startswith(skip)]
    return any(_scoring(tensor, count, over_places) for tensor in beside)


def _scoring(matrix: Tensor, count: int, over_places: bool) -> bool:
    return count in matrix.shape if matrix.ndim == 2 else over_places and matrix.ndim > 2 and count == matrix.shape[0]


def _block_path(
    modules: dict[str, nn.Module], path: str, bank: tuple[str, ...], count: int, certain: bool, over_places: bool
) -> str | None:
    """The nearest module around a bank of experts that also holds something to route with.

    Where there is none, it is the bank's parent, or nothing if it isn't certain that it is a bank.
    """
    if not count or _scores(modules[path], count, bank, over_places):
        return path
    if not bank and (whole := _around_shards(modules, path, count)) is not None:
        return whole
    block_like = certain and takes_one(modules[path])
    if not (block_like and bank) or not any(True for _ in _beside(modules[path], *bank)):
        for outer in list(outwards(path))[1 : 2 if block_like else _LEVELS + 1]:
            inside = path[len(outer) :].lstrip(".")
            if outer not in modules or isinstance(modules[outer], (nn.ModuleList, nn.ModuleDict)):
                break
            if _scores(modules[outer], count, (inside,), over_places):
                return _around_gathering(modules, outer)
            if bank and any(p.ndim == 3 and len(p) == count for p in modules[outer].parameters(recurse=False)):
                return outer  # slots of each expert, which take some of every token
    if not certain:
        return None
    parent = path.rpartition(".")[0]
    # A bank alone, called with more than tokens: what sends tokens there is of another kind than a matrix of scores.
    if bank and not takes_one(modules[path]) and not any(True for _ in _beside(modules[path], *bank)):
        around = (outer for outer in list(outwards(path))[1 : _LEVELS + 1] if outer in modules)
        of_one = next((outer for outer in around if takes_one(modules[outer])), None)
        if of_one is not None and any(True for _ in _beside(modules[of_one], path[len(of_one) :].lstrip("."))):
            return of_one
    listed = not path or parent not in modules or isinstance(modules[parent], (nn.ModuleList, nn.ModuleDict))
    return path if bank or listed or takes_one(modules[path]) else parent


def _around_gathering(modules: dict[str, nn.Module], path: str) -> str:
    """A path, or that around it where that module is all it holds, names its input, and the module gathers ``*all``."""
    around, _, name = path.rpartition(".")
    gathers = inspect.signature(modules[path].forward).parameters.values()
    if not path or not any(p.kind is p.VAR_POSITIONAL for p in gathers) or takes_one(modules[path]):
        return path
    alone = not any(True for _ in _beside(modules[around], name))
    return around if alone and takes_one(modules[around]) else path


def _around_shards(modules: dict[str, nn.Module], path: str, count: int) -> str | None:
    """The module around a list of equal modules, each with the same ``count`` of experts stacked, that scores all."""
    listed = path.rpartition(".")[0]
    outer, _, name = listed.rpartition(".")
    members = list(modules[listed].children()) if listed and isinstance(modules[listed], nn.ModuleList) else []
    alike = len(set(map(_form, members))) == 1
    return outer if alike and _scores(modules[outer], count * len(members), without=(name,)) else None


def _beside(module: nn.Module, *inside: str) -> Iterator[Tensor]:
    """The weights of ``module`` that aren't those of its children ``inside``."""
    skip = tuple(f"{name}." for name in inside)
    yield from (tensor for name, tensor in own_parameters(module) if not name.startswith(skip))


def takes_one(module: nn.Module) -> bool:
    """Whether ``module`` is called with one tensor, as a block is; a module of experts alone is told where to route."""
    if not _called_itself(module):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1
