"""Adapters left out: what a module's matrices were before somebody put low-rank ones beside them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

_ADAPTED = "base_layer"
"""PEFT's layers hold what they adapt under this name, and beside it what they add."""


def own_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that ``module`` holds directly, adapted or not."""
    for child in module.children():
        while (adapted := dict(child._modules.items()).get(_ADAPTED)) is not None:
            child = adapted
        if isinstance(child, nn.Linear):
            yield child


def own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of ``module`` and of what is inside it, each once and by name, without those that adapters add."""
    waiting, seen = [("", module)], set[int]()
    while waiting:
        prefix, part = waiting.pop()
        held = dict(part._modules.items())  # of TorchScript it is no dict
        adapted = held.get(_ADAPTED)
        if adapted is None:
            for name, tensor in part._parameters.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield prefix + name, tensor
        inside = list(held.items()) if adapted is None else [(_ADAPTED, adapted)]
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(inside) if child is not None]
