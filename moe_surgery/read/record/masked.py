"""Scores that are masked before they are ranked, as experts outside of chosen groups are: which stay open."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

_AS_THEY_WERE = frozenset("view reshape _unsafe_view clone _to_copy detach alias squeeze unsqueeze add div".split())


def open_places(node: torch.fx.Node, numbers: dict[str, Tensor]) -> Tensor | None:
    """Which of the scores that ``node`` makes are no masked ones, bool in its shape; None if it has no known mask.

    ``numbers`` are the record's own known ones, by name.
    """
    shape = node.meta["val"].shape
    while node.op == "call_function" and node.meta.get("name") in _AS_THEY_WERE:
        node = node.args[0]  # type: ignore[assignment]
        if not isinstance(node, torch.fx.Node) or node.meta["val"].numel() != shape.numel():
            return None
    found = _mask(node, numbers)
    return None if found is None else found.expand(node.meta["val"].shape).reshape(shape)


def _mask(node: torch.fx.Node, numbers: dict[str, Tensor]) -> Tensor | None:
    def known(operand: Any) -> Tensor | None:
        return numbers.get(str(operand.target)) if isinstance(operand, torch.fx.Node) else None

    name = node.meta.get("name")
    if name == "masked_fill" and (mask := known(node.args[1])) is not None:
        return ~mask.bool()
    if name == "where" and (mask := known(node.args[0])) is not None:
        yes, no = (isinstance(arg, torch.fx.Node) and known(arg) is None for arg in node.args[1:3])
        return mask.bool() if yes and not no else ~mask.bool() if no and not yes else None
    if name == "mul":
        masks = [mask for operand in node.args[:2] if (mask := known(operand)) is not None]
        return masks[0] != 0 if masks else None
    return None


def moved_inside(ids: Tensor, places: Tensor) -> Tensor:
    """``ids`` [rows, k] in which each that isn't among the open ``places`` [rows, choices] is one that is.

    Those that were visited least come first, so that all are.
    """
    ids, visits = ids.clone(), torch.zeros(places.shape[1], dtype=torch.int64)
    for row, mine in zip(ids, places, strict=True):
        if int(mine.sum()) >= len(row):
            kept = [number for number in row.tolist() if mine[number]]
            others = [number for number in mine.nonzero().flatten().tolist() if number not in kept]
            others.sort(key=lambda number: int(visits[number]))
            row.copy_(torch.tensor((kept + others)[: len(row)]))
        visits[row] += 1
    return ids
