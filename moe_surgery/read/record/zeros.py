"""Numbers among zeros: where they are is known, and code may ask for it, if they are above zero.

That they are, and that there are zeros elsewhere, is checked when the record is parsed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_surgery.read.record.known_numbers import Kind
from moe_surgery.read.record.tensor_entries import Entry, Support

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook

# Operations that move elements and do nothing else.
SHAPED = frozenset("view reshape unsqueeze squeeze expand select slice detach alias t transpose permute clone".split())


@dataclass(frozen=True, eq=False)
class _Mask:
    """Where an operand may be other than zero; everywhere if ``found`` is None."""

    found: Tensor | None
    kind: Kind


def support(
    func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry], shape: torch.Size
) -> Support | None:
    """Where a result of ``shape`` may be other than zero, if that is known."""
    masks = [_mask(entries.get(id(arg))) for arg in args[:2]]
    first = masks[0] if masks else _Mask(None, Kind.PLAIN)
    if name == "scatter":
        return _scattered(args, entries)
    if name == "mul" and any(mask.found is not None for mask in masks):
        found = torch.ones(shape, dtype=torch.bool)
        for mask in masks:
            found = found if mask.found is None else found & mask.found
        return Support(found, max(mask.kind for mask in masks))
    if name == "add" and len(masks) == 2 and masks[0].found is not None and masks[1].found is not None:
        return Support(masks[0].found | masks[1].found, max(mask.kind for mask in masks))
    if name in ("mm", "bmm") and any(mask.found is not None for mask in masks):
        return _multiplied([_mask(entries.get(id(arg)), everywhere=True) for arg in args[:2]])
    if first.found is None or (entry := entries.get(id(args[0]))) is None or entry.support is None:
        return None
    if name in SHAPED:
        kept = {key: value for key, value in kwargs.items() if key == "implicit"}
        return Support(func(first.found, *args[1:], **kept), first.kind)
    if name == "div" and kwargs.get("rounding_mode") is None:
        return Support(first.found.expand(shape), first.kind)
    if name == "_to_copy" or (name == "add" and type(args[1]) is int and args[1] == 0):  # as sum() begins
        return entry.support
    if name == "sum" and len(args) > 1 and args[1]:
        return Support(first.found.to(torch.int64).sum(*args[1:]) > 0, first.kind)
    return None


def _multiplied(masks: list[_Mask]) -> Support | None:
    """Where a product of matrices may be other than zero."""
    found = [mask.found.double() for mask in masks if mask.found is not None]
    return Support(found[0] @ found[1] > 0, max(mask.kind for mask in masks)) if len(found) == 2 else None


def _mask(entry: Entry | None, everywhere: bool = False) -> _Mask:
    """Where an operand may be other than zero; with ``everywhere`` that is found of known numbers without zeros too."""
    if entry is not None and entry.support is not None:
        return _Mask(entry.support.places, entry.support.kind)
    if (
        entry is not None
        and entry.real is not None
        and entry.kind < Kind.COUNT
        and (everywhere or not bool(entry.real.all()))
    ):
        return _Mask(entry.real != 0, entry.kind)
    return _Mask(None, Kind.PLAIN)


def _scattered(args: Any, entries: dict[int, Entry]) -> Support | None:
    """Where weights were put among zeros."""
    first, index, source = (entries.get(id(args[place])) for place in (0, 2, 3))
    if first is None or first.real is None or index is None or index.real is None or bool(first.real.any()):
        return None
    if index.kind != Kind.CHOSEN or source is None or source.node is None:
        return None
    zeros = torch.zeros(first.real.shape, dtype=torch.bool)
    return Support(zeros.scatter(args[1], index.real, torch.ones(index.real.shape, dtype=torch.bool)), Kind.CHOSEN)


def asked_of_support(
    notebook: Notebook, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]
) -> Tensor | None:
    """Where numbers are that were put among zeros, asked of the tensor that they were put in."""
    first = entries.get(id(args[0])) if args else None
    if first is not None and first.support is None and name == "nonzero":
        return _taken_for_all(notebook, func, args, kwargs, first)
    if first is None or first.support is None:
        return None
    number = args[1] if len(args) > 1 and isinstance(args[1], (int, float)) else None
    as_mask = (name in ("gt", "ne") and number == 0) or (name == "_to_copy" and kwargs.get("dtype") is torch.bool)
    if name != "nonzero" and not as_mask:
        return None
    notebook.positive.append((first.node, first.support.places))
    places = first.support.places
    real = places.clone() if as_mask else places.nonzero()
    kind = first.support.kind if as_mask else Kind.COUNT
    notebook.entries.enter(real, None, None, real, kind)
    notebook.lineage.asked(real, func, args[1:], kwargs, first.node)
    return real


def _taken_for_all(notebook: Notebook, func: Any, args: Any, kwargs: Any, asked: Entry) -> Tensor | None:
    """Every place of numbers of which code asks where they are above zero, or other than zero; None if it doesn't."""
    node = asked.node
    if node is not None and node.meta.get("name") in ("gt", "ne") and node.args[1] == 0:
        node = node.args[0]
    if node is None or asked.meta is None or not node.meta["val"].is_floating_point():
        return None
    places = torch.ones(asked.meta.shape, dtype=torch.bool)
    notebook.positive.append((node, places))
    real = places.nonzero()
    notebook.entries.enter(real, None, None, real, Kind.COUNT)
    notebook.lineage.asked(real, func, args[1:], kwargs, asked.node)
    return real
