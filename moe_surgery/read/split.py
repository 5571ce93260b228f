"""A block split where its routing is done: expert ids and routing weights, whatever they come of, meet the experts.

Of a record this makes one in which some tensor on the way is taken as given: the routing weights, [T, k] beside the ids
of a top-k. If the rest of the record is routed experts and a shared expert, the block can be split there: its own code
finds ids and weights, as it always did, and the experts are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from moe_surgery.read.parse.token_output import TokenRead
from moe_surgery.read.parsed import Cut, Record, parse_record
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Choice, Flow, Op, Ref

_MADE = frozenset(["input", "const", "param"])


def parse_split(flow: Flow, dtype: torch.dtype) -> Record:
    """What a record says of every token, of a block that is split at its ids and weights.

    Raises :class:`~moe_surgery.read.reading.Unreadable` if there is no place to split it at.
    """
    problem = Unreadable("its router makes no weights for the experts that it chooses")
    if flow.positive:
        raise Unreadable("what it does depends on the values it computes (which of them are above zero)")
    for numbers, place in _places(flow):
        choices, weights = [flow.choices[number] for number in numbers], flow.ops[place]
        ranked, experts = sum(choice.k for choice in choices), flow.ops[choices[0].scores.index].shape[-1]
        count = weights.shape[-1] if ranked > 1 else 1
        ids = torch.cat([choice.ids.reshape(-1, choice.k) for choice in choices], -1)[:, :count]
        given = Op("input", ("weights",), {}, (len(ids), count), weights.dtype)
        shaped = Op("view", (Ref(place), list(weights.shape)), {}, weights.shape, weights.dtype)
        split = _with(flow, place, given, shaped)
        split = replace(split, choices=(Choice(Ref(place), count, ids, True),), results=None, kept={})
        try:
            found = parse_record(split, dtype)
        except Unreadable as error:
            problem = error
            continue
        if any(len(token.slots) != count or None in token.slots for token in found.tokens):
            continue
        tokens = tuple(_of(token, count, experts) for token in found.tokens)
        whole = replace(found, tokens=tokens, ids=ids, ranked=ranked, cut=Cut(numbers, place, count))
        return whole.with_replayed(flow)
    raise problem


def _of(token: TokenRead, count: int, experts: int) -> TokenRead:
    return replace(token, router=replace(token.router, top_k=count, num_experts=experts))


def _places(flow: Flow) -> Iterator[tuple[tuple[int, ...], int]]:
    """Choices, and operations that may give their weights, both latest first.

    Some code chooses one expert after the other: then all choices of one are taken together.
    """
    lead = next(op.shape[:-1] for op in flow.ops if op.name == "input")
    tokens = torch.Size(lead).numel()
    single = [(number,) for number in reversed(range(len(flow.choices)))]
    ones = tuple(number for number, choice in enumerate(flow.choices) if choice.k == 1)
    alike = len({flow.ops[flow.choices[number].scores.index].shape for number in ones}) == 1
    for numbers in [*single, *([ones] if len(ones) > 1 and alike else [])]:
        ranked = sum(flow.choices[number].k for number in numbers)
        for place in range(len(flow.ops) - 1, flow.choices[numbers[0]].scores.index, -1):
            op = flow.ops[place]
            one = ranked == 1 and torch.Size(op.shape).numel() == tokens
            several = len(op.shape) > 1 and 1 < op.shape[-1] <= ranked and op.shape[:-1] in ((tokens,), lead)
            if op.name not in _MADE and op.dtype.startswith(("float", "bfloat")) and (one or several):
                yield numbers, place


def _with(flow: Flow, place: int, given: Op, shaped: Op) -> Flow:
    """The record with ``given`` for operation ``place``, in the shape that it had there."""
    if given.shape == shaped.shape:
        return replace(flow, ops=(*flow.ops[:place], given, *flow.ops[place + 1 :]))

    def moved(operand: Any) -> Any:
        if isinstance(operand, Ref):
            return Ref(operand.index + (operand.index >= place))
        if isinstance(operand, (list, tuple)):
            return type(operand)(map(moved, operand))
        return operand

    later = [
        replace(op, args=moved(op.args), kwargs={name: moved(value) for name, value in op.kwargs.items()})
        for op in flow.ops[place + 1 :]
    ]
    before = list(flow.ops[:place])
    return replace(flow, ops=(*before, given, shaped, *later), output=moved(flow.output))
