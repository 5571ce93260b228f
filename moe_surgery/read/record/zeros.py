"""Weights put among zeros: where they are is known, and code may ask for it, as they are above zero.

That they are is checked when the record is parsed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_surgery.read.record.known_numbers import Kind
from moe_surgery.read.record.tensor_entries import Entry

if TYPE_CHECKING:
    from moe_surgery.read.record.recorder import Recorder

# Operations that move elements and do nothing else.
SHAPED = frozenset("view reshape unsqueeze squeeze expand select slice detach alias t transpose permute".split())


def support(func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]) -> tuple[Tensor | None, Any]:
    """Where the result may be other than zero, and what stands there, if weights were put among zeros."""
    first = entries.get(id(args[0])) if args else None
    if name == "scatter" and first is not None and first.real is not None and not bool(first.real.any()):
        index, source = entries.get(id(args[2])), entries.get(id(args[3]))
        chosen = index is not None and index.kind == Kind.CHOSEN and source is not None and source.node is not None
        if index is not None and index.real is not None and source is not None and chosen:
            zeros = torch.zeros(first.real.shape, dtype=torch.bool)
            return zeros.scatter(args[1], index.real, torch.ones(index.real.shape, dtype=torch.bool)), source.node
    if name in SHAPED and first is not None and first.support is not None:
        return func(first.support, *args[1:], **kwargs), first.positive
    return None, None


def asked_of_support(recorder: Recorder, name: str, args: Any, entries: dict[int, Entry]) -> Tensor | None:
    """Where weights are that were put among zeros, asked of the tensor that they were put in."""
    first = entries.get(id(args[0]))
    if first is None or first.support is None:
        return None
    number = args[1] if len(args) > 1 and isinstance(args[1], (int, float)) else None
    if not (name == "nonzero" or (name in ("gt", "ne") and number == 0)):
        return None
    if first.positive not in recorder.positive:
        recorder.positive.append(first.positive)
    real = first.support.nonzero() if name == "nonzero" else first.support.clone()
    recorder.entries.enter(real, None, None, real, Kind.COUNT if name == "nonzero" else Kind.CHOSEN)
    return real
