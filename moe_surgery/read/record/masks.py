"""Selection by a known mask, as selection by the places where it holds: a mask has no meta result, places do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_surgery.read.record.known_numbers import Kind
from moe_surgery.read.record.lineage import Lineage
from moe_surgery.read.record.tensor_entries import Entries, Entry


def as_index(func: Any, name: str, args: Any, entries: dict[int, Entry]) -> tuple[Any, str, Any]:
    """The operation, its name and its arguments; a selection by a known mask of the whole shape is an index."""
    if name == "masked_select" and entries[id(args[1])].real is not None and args[0].shape == args[1].shape:
        return torch.ops.aten.index.Tensor, "index", (args[0], [args[1]])
    return func, name, args


def by_places(indices: Sequence[Any], entries: dict[int, Entry], known: Entries, lineage: Lineage) -> list[Any]:
    """What stands for each dimension in an index, without masks; the places are entered in both."""
    found: list[Any] = []
    for index in indices:
        entry = entries.get(id(index))
        if entry is None or entry.real is None or entry.real.dtype not in (torch.bool, torch.uint8):
            found.append(index)
            continue
        places = entry.real.nonzero().unbind(1)
        lineage.placed(index, places)
        entries.update((id(place), known.enter(place, None, None, place, Kind.COUNT)) for place in places)
        found += places
    return found


def check_places(tensor: torch.Tensor, indices: Sequence[Any], entries: dict[int, Entry]) -> None:
    """Raise :class:`IndexError` for places that a tensor doesn't have: on the meta device torch doesn't look."""
    for size, index in zip(tensor.shape, indices, strict=False):
        entry = entries.get(id(index))
        if entry is not None and entry.real is not None and entry.real.numel() and int(entry.real.max()) >= size:
            raise IndexError(f"index {int(entry.real.max())} is out of bounds for a dimension of size {size}")
