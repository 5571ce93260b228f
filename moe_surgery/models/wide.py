"""The matrices of a module, and experts that lie side by side in wide ones: ``[E * I, H]`` beside ``[E, H]``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from moe_surgery.models.adapters import own_layers, own_parameters

HINT = "expert"
"""What experts are called by somebody, in whatever name."""


def matrices(module: nn.Module, over_places: bool = False) -> list[Tensor]:
    """The matrices of a module; a convolution over one place is one, and one ``over_places`` if that is asked."""
    own = {id(tensor): tensor for _, tensor in own_parameters(module)}
    if over_places:
        layers = (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)))
        weights = (id(layer._parameters.get("weight")) for layer in layers)  # a router that was replaced gives none
        return [own[weight] for weight in weights if weight in own]
    return [p for p in own.values() if p.ndim == 2 or (p.ndim > 2 and set(p.shape[2:]) == {1})]


def outwards(path: str) -> Iterator[str]:
    """A path and those of all modules around it."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def wide_layers(module: nn.Module) -> tuple[bool, bool]:
    """Whether ``module`` holds an MLP of layers ``[E * I, H]`` and ``[H, E * I]``, and beside it a matrix ``[E, H]``.

    It is certain that these are experts where there is an up projection.
    """
    own = [layer.weight for layer in own_layers(module)]
    shapes = Counter(tuple(weight.shape) for weight in [*own, *module.parameters(recurse=False)] if weight.ndim == 2)
    for (wide, hidden), times in shapes.items():
        if times > 2 or shapes.get((hidden, wide), 0) != 1 or shapes.total() != times + 2:
            continue
        if any(hidden in shape and 1 < min(shape) < wide and wide % min(shape) == 0 for shape in shapes):
            return True, times == 2
    return False, False


def around_wide(outer: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is an MLP of wide layers alone, and ``outer`` has a layer ``[E, H]`` or so of its own."""
    layers = [layer.weight for layer in own_layers(module)]
    if not 2 <= len(layers) <= 3 or len(layers) != sum(1 for child in module.children() if matrices(child)):
        return False
    (wide, hidden), *others = sorted((tuple(weight.shape) for weight in layers), reverse=True)
    if wide <= hidden or others[-1] != (hidden, wide) or set(others[:-1]) - {(wide, hidden)}:
        return False
    own = [layer.weight for layer in own_layers(outer)]
    scoring = [min(p.shape) for p in [*own, *outer.parameters(recurse=False)] if p.ndim == 2 and hidden in p.shape]
    return any(1 < count < hidden and wide % count == 0 for count in scoring)


def around_stacked(modules: dict[str, nn.Module], path: str) -> tuple[set[str], bool]:
    """The nearest module around experts stacked in matrices, ``[E * I, H]`` each, that holds a matrix ``[E, H]``.

    It is certain that these are experts where there are three of a size, or two that are called experts, and the matrix
    is that of a layer beside them.
    """
    if isinstance(modules[path], (nn.RNNBase, nn.RNNCellBase)):
        return set(), False
    own = [p for p in modules[path].parameters(recurse=False) if p.ndim == 2]
    widths = Counter(p.shape[1] for p in own)
    hidden, several = widths.most_common(1)[0] if own else (0, 0)
    if several < 2:
        return set(), False
    stacked = [p for p in own if p.shape[1] == hidden]
    rows = [p.shape[0] for p in stacked]
    alike = Counter(rows).most_common(1)[0][1]
    certain = alike > 2 or (alike > 1 and HINT in type(modules[path]).__name__.lower())
    for outer in outwards(path):
        inside = f"{path[len(outer) :].lstrip('.')}." if outer != path else ""
        for name, tensor in own_parameters(modules[outer]) if outer in modules else ():
            if tensor.ndim != 2 or hidden not in tensor.shape or (inside and name.startswith(inside)):
                continue
            experts = tensor.shape[0] if tensor.shape[1] == hidden else tensor.shape[1]
            larger = [count for count in rows if count > experts]
            if experts > 1 and len(larger) > 1 and not any(count % experts for count in larger):
                layer = tensor.shape[1] == hidden and (bool(inside) or "." in name)
                return {outer}, certain and layer
    return set(), False
