"""How many experts a module may have, as far as its weights and attributes tell."""

from __future__ import annotations

from torch import Tensor, nn


def totals(module: nn.Module, state: dict[str, Tensor]) -> list[int]:
    """What the number of experts may be, likeliest first."""
    stacked = [tensor.shape[0] for tensor in state.values() if tensor.ndim == 3]
    lists = [len(child) for child in module.modules() if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    named = [value for value in vars(module).values() if type(value) is int and 1 < value <= 1 << 14]
    return [total for total in dict.fromkeys([*stacked, *lists, *named]) if total > 0]
