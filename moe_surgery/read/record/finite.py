"""Whether code asks for nothing but whether what it computes is finite."""

from __future__ import annotations

import math
from typing import Any

import torch.fx

_OF_ANSWERS = frozenset(
    ["any", "all", "logical_not", "logical_or", "logical_and", "bitwise_not", "bitwise_or", "bitwise_and", "mul", "sum"]
)


def asks_finite(value: Any) -> bool:
    """Whether truths are made by asking whether numbers are finite, infinite or none, and of nothing else."""
    if not isinstance(value, torch.fx.Node):
        return False
    name, args = value.meta.get("name"), value.args
    if name in ("isnan", "isinf", "isfinite"):
        return True
    if name in ("eq", "ne"):  # a number that isn't itself is none
        return args[0] is args[1] or (isinstance(args[1], float) and math.isinf(args[1]))
    return name in _OF_ANSWERS and all(map(asks_finite, value.all_input_nodes))
