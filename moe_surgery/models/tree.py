"""Walking a model's module tree for places that look like sparse-MoE blocks.

Looking is generous and decides nothing: a place is a site if it holds a bank of experts, told by structure. Whether it
is a block that can be replaced is for reading to say; what can't be read is reported as missed, never passed over.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_surgery.models.site import Site
from moe_surgery.targets.base import SwappedBlock

_HINT = "expert"
_MOST_MATRICES = 6  # of one expert; a list of whole layers isn't a list of experts


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of ``model`` in the order of its module tree; blocks swapped in before are sites too."""
    modules = dict(model.named_modules())
    paths = {path for path, module in modules.items() if isinstance(module, SwappedBlock)}
    for path, module in modules.items():
        if not any(path == done or path.startswith(f"{done}.") for done in paths):
            paths |= {_block_path(modules, path, bank, count) for bank, count in _banks(module)}
            paths |= _around_stacked(modules, path)
    inner = {path for path in paths if not any(other != path and _inside(other, path) for other in paths)}
    return tuple(Site(path, module) for path, module in modules.items() if path in inner)


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.") if outer else True


def _banks(module: nn.Module) -> Iterator[tuple[tuple[str, ...], int]]:
    """Banks of experts that ``module`` holds directly: ``(names of its children, number of experts)``.

    No name means stacked tensors of the module's own. A bank is one list of MLPs or several lists of single layers.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        own = module.parameters(recurse=False)
        stacked = Counter(p.shape[0] for p in own if p.ndim == 3 and min(p.shape) > 1)
        for count, times in stacked.items():
            if times > 1 or _HINT in type(module).__name__.lower():
                yield (), count
                break
    singles: dict[int, tuple[str, ...]] = {}
    tables = Counter(child.weight.shape for child in module.children() if isinstance(child, nn.Embedding))
    if max(tables.values(), default=0) > 1 and any(isinstance(child, nn.Linear) for child in module.children()):
        yield (), 0  # experts of one row each, looked up by number
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
            members = [list(member.parameters()) for member in child.children()]
            matrices = [sum(p.ndim == 2 for p in parameters) for parameters in members if parameters]
            count, named = len(matrices), _HINT in name.lower()
            if count < 2 or max(matrices) > _MOST_MATRICES:
                continue
            if (named and min(matrices) >= 1) or (min(matrices) >= 2 and _scores(module, count, without=(name,))):
                yield (name,), count
            elif max(matrices) == min(matrices) == 1:
                singles[count] = (*singles.get(count, ()), name)
    for count, names in singles.items():
        if len(names) > 1 and _scores(module, count, without=names):
            yield names, count


def _around_stacked(modules: dict[str, nn.Module], path: str) -> set[str]:
    """The nearest module around experts stacked in matrices, ``[E * I, H]`` each, that holds a matrix ``[E, H]``."""
    if isinstance(modules[path], (nn.RNNBase, nn.RNNCellBase)):
        return set()
    own = Counter(p.shape for p in modules[path].parameters(recurse=False) if p.ndim == 2)
    shape, times = own.most_common(1)[0] if own else (torch.Size(), 0)
    if times < (2 if _HINT in type(modules[path]).__name__.lower() else 3):
        return set()
    for outer in _outwards(path):
        inside = f"{path[len(outer) :].lstrip('.')}." if outer != path else ""
        for name, tensor in modules[outer].named_parameters() if outer in modules else ():
            if not inside and "." not in name:
                continue
            fits = tensor.ndim == 2 and tensor.shape[1] == shape[1] and 1 < tensor.shape[0] < shape[0]
            if fits and shape[0] % tensor.shape[0] == 0 and not (inside and name.startswith(inside)):
                return {outer}
    return set()


def _outwards(path: str) -> Iterator[str]:
    """A path and those of all modules around it."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _scores(module: nn.Module, count: int, without: tuple[str, ...]) -> bool:
    """Whether ``module`` holds, outside its children ``without``, a matrix with one row or column per expert.

    Biases of stacked experts are such matrices too, but nothing to route with.
    """
    skip = tuple(f"{name}." for name in without)
    named = (*module.named_parameters(), *module.named_buffers())
    return any(_scoring(tensor, count) for name, tensor in named if "bias" not in name and not name.startswith(skip))


def _scoring(matrix: Tensor, count: int) -> bool:
    return matrix.ndim == 2 and count in matrix.shape


def _block_path(modules: dict[str, nn.Module], path: str, bank: tuple[str, ...], count: int) -> str:
    """The nearest module around a bank of experts that also holds something to route with; else the bank's parent."""
    if not count or _scores(modules[path], count, without=bank):
        return path
    parent, _, name = path.rpartition(".")
    if bank or not path or parent not in modules or isinstance(modules[parent], (nn.ModuleList, nn.ModuleDict)):
        return path
    return parent if _scores(modules[parent], count, without=(name,)) or not _takes_one(modules[path]) else path


def _takes_one(module: nn.Module) -> bool:
    """Whether ``module`` is called with one tensor, as a block is; a module of experts alone is told where to route."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 1
