"""Top-ks, sorts and maxima along another dimension than the last, as of scores [B, E, h, w]: those along the last."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RANKINGS = {
    "topk": ("input", "k", "dim", "largest", "sorted"),
    "sort": ("input", "dim", "descending"),
    "max": ("input", "dim", "keepdim"),
    "argmax": ("input", "dim", "keepdim"),
}
"""The arguments of the functions that rank, by name."""


def along_the_last(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Container[int]) -> Any:
    """What a ranking called ``name`` along another dimension makes, by one along the last; None if it is none.

    One along a dimension whose size is one of the ``batch`` chooses tokens, and is none.
    """
    given = {**dict(zip(RANKINGS[name], args, strict=False)), **kwargs}
    scores, dim = given.pop("input", None), given.pop("dim", -1)
    if not isinstance(scores, Tensor) or type(dim) is not int or "out" in given:
        return None
    if scores.ndim < 2 or dim % scores.ndim == scores.ndim - 1 or scores.shape[dim] in batch:
        return None
    found = getattr(torch, name)(scores.movedim(dim, -1), dim=-1, **given)
    if name in ("max", "argmax") and not given.get("keepdim"):
        return found
    if name == "argmax":
        return found.movedim(-1, dim)
    return getattr(torch.return_types, name)(tuple(part.movedim(-1, dim) for part in found))
