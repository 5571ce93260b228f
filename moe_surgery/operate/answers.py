"""What modules were given and returned: copies to keep, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def kept(value: Any) -> tuple[Any, ...]:
    """Copies of the tensors in nested containers, and the plain values; what else there is says nothing."""
    kept: list[Any] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            kept.append(leaf.detach().clone())
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            kept.append(leaf)
    return tuple(kept)


def copied(answer: Any) -> Any:
    """What a block returned, with copies of its tensors."""
    return tree_map_only(Tensor, Tensor.clone, answer)


def form(answer: Any) -> str:
    """The form of what a block returned: its structure, and shapes and dtypes of the tensors in it."""
    leaves = [
        f"{tuple(leaf.shape)} in {str(leaf.dtype).removeprefix('torch.')}"
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
        for leaf in tree_leaves(answer)
    ]
    return leaves[0] if isinstance(answer, Tensor) else f"{type(answer).__name__}({', '.join(leaves)})"


def distance(values: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The greatest relative L2 distance of two tensors in the same place; infinite where anything else differs."""
    if len(values) != len(wanted):
        return math.inf
    return max((_far(one, other) for one, other in zip(values, wanted, strict=True)), default=0.0)


def _far(one: Any, other: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return 0.0 if type(one) is type(other) and (one == other or one != one) else math.inf
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    if not one.is_floating_point():
        return math.inf
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return math.inf
    one, other = one[finite].double(), other[finite].double()
    norm = float(other.norm())
    return float((one - other).norm()) / norm if norm else math.inf


def much(apart: float) -> str:
    return f"relative distance {apart:.2g}" if math.isfinite(apart) else "of another shape or kind, or not finite"
