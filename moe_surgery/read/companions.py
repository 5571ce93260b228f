"""Tensors that a block needs beside its input: which forms they may have is found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from moe_surgery.replay import At, Many, Program, Step

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
        if reading.program is not None:
            companion = next(c for c in reading.program.companions if c.key == companion.key)
        also = []
        for dtype in (torch.int64, torch.bool, None):
            other = replace(companion, dtype=dtype)
            if dtype != companion.dtype:
                with suppress(Unreadable):
                    if _taking(read(_of(reading.calling, place, other)), place, companion) == reading:
                        also.append(dtype)
        reading = _taking(reading, place, replace(companion, also=tuple(also)))
    return reading


def reaching_all(program: Program, companions: tuple[Companion, ...]) -> Program:
    """A program with ``companions`` made up so that every expert is reached which what remains of one chooses."""
    return replace(program, companions=tuple(replace(one, below=_below(program.steps, one)) for one in companions))


def _below(steps: Sequence[Step], companion: Companion) -> int:
    """What the numbers of a ``companion`` are to be below, of which ``steps`` take what remains."""
    found: dict[int, int] = {}  # steps that it comes to
    for number, step in enumerate(steps):
        first = step.args[0] if step.args else None
        if step.func == "beside" and first == companion.key:
            found[number] = companion.below
        elif isinstance(first, At) and first.number in found:
            by = step.args[1] if step.func is torch.ops.aten.remainder.Scalar else 0
            found[number] = max(found[first.number], int(by.was) if isinstance(by, Many) else by)
    return max(found.values(), default=companion.below)


def _of(calling: Calling, place: int, companion: Companion) -> Calling:
    """The same where the argument at ``place`` is a ``companion``."""
    arguments = list(calling.arguments)
    arguments[place] = replace(arguments[place], role="beside", companion=companion)
    return replace(calling, arguments=tuple(arguments))


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
