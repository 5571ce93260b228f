"""Tensors that a block needs beside its input: which forms they may have is found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_surgery.calling import Calling
from moe_surgery.companion import Companion
from moe_surgery.read.batches import hidden_sizes
from moe_surgery.read.counts import totals
from moe_surgery.read.reading import Reading, Unreadable
from moe_surgery.read.record.arguments import passed_on
from moe_surgery.replay import Program

_MOST = 2  # sizes of a kind, of which each is tried


def with_companions(block: nn.Module, calling: Calling) -> Iterator[Calling]:
    """Ways to call ``block`` with a tensor for one thing that it was called without.

    A form in which the block's own forward fails is none that it takes.
    """
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for argument in passed_on(calling):
        for form in _forms(block, argument.name, state):
            yield _of(calling, calling.arguments.index(argument), form)


def with_others_alike(reading: Reading, read: Callable[[Calling], Reading]) -> Reading:
    """A reading that says of which other dtypes what it takes beside its input may be: those of which ``read`` says the
    same, down to every operation.
    """
    for place, argument in enumerate(reading.calling.arguments):
        companion = argument.companion
        if companion is None or companion.over != "tokens":
            continue
        also = []
        for dtype in (torch.int64, torch.bool, None):
            other = replace(companion, dtype=dtype)
            if dtype != companion.dtype:
                with suppress(Unreadable):
                    if _taking(read(_of(reading.calling, place, other)), place, companion) == reading:
                        also.append(dtype)
        reading = _taking(reading, place, replace(companion, also=tuple(also)))
    return reading


def _of(calling: Calling, place: int, companion: Companion) -> Calling:
    """The same where the argument at ``place`` is a ``companion``."""
    arguments = list(calling.arguments)
    arguments[place] = replace(arguments[place], role="beside", companion=companion)
    return Calling(tuple(arguments))


def _taking(reading: Reading, place: int, companion: Companion) -> Reading:
    """The same where the argument at ``place`` is a ``companion``."""
    calling = _of(reading.calling, place, companion)

    def of(program: Program | None) -> Program | None:
        if program is None:
            return None
        return replace(program, companions=calling.companions, of_tokens=of(program.of_tokens))

    return replace(reading, calling=calling, program=of(reading.program))


def _forms(block: nn.Module, name: str, state: dict[str, Tensor]) -> list[Companion]:
    """What an argument may be, likeliest first: one number a token, or a vector, or one of each expert."""
    tables = [len(tensor) for tensor in state.values() if tensor.ndim and not tensor.is_floating_point()]
    below = min([size for size in tables if size > 1], default=2)
    found = [
        Companion(name, "features"),
        Companion(name, "tokens", torch.int64, below),
        Companion(name, "tokens", torch.bool),
        Companion(name, "tokens"),
    ]
    widths = hidden_sizes(state)[:_MOST]
    counts = totals(block, state)[:_MOST]
    return found + [Companion(name, (count, width)) for count in counts for width in widths]
