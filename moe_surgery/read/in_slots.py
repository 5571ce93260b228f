"""Reading a module of routed experts that is called with tokens in slots, so many for each expert.

Where a block can't be read because of what it does with its tokens before they come to its experts (it drops some above
a capacity, draws random numbers, mixes them, has experts choose), what the experts compute of each slot is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from moe_surgery.calling import Calling
from moe_surgery.read.batches import hidden_sizes, odd_batch
from moe_surgery.read.counts import totals
from moe_surgery.read.experts import of_records
from moe_surgery.read.parsed import Record, parse_record
from moe_surgery.read.reading import Reading, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import arguments_of
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.block_run import record_slots
from moe_surgery.read.record.experts_dispatch import own_forward
from moe_surgery.read.record.flow import Choice, Flow, Op, Ref
from moe_surgery.read.record.state import Watch
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.unrecorded import check_site
from moe_surgery.slots import Slots

_FORMS = ((0, 3), (1, 4), (0, 4), (1, 3))  # where the experts stand, in how many dimensions; likeliest first


def slots_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside ``block`` that may be experts with slots: with a bank of their own, called with one tensor."""
    for path, module in block.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
        lists = [child for child in module.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
        if path and (own or lists) and _takes_one(module):
            yield path, module


def _takes_one(module: nn.Module) -> bool:
    try:
        arguments_of(module)
    except (Unreadable, ValueError, TypeError):
        return False
    return True


def read_in_slots(module: nn.Module) -> Reading:
    """What a module of experts computes of slots [E, C, H], or such with one more dimension before the slots or all.

    Raises :class:`~moe_surgery.read.reading.Unreadable` with the reason if anything in it can't be accounted for.
    """
    state = check_site(module)
    calling, problem = arguments_of(module), None
    with own_forward(module):
        watch = Watch(module)
        for width, total in product(hidden_sizes(state), totals(module, state)):
            found: list[Reading] = []
            for axis, dimensions in _FORMS:
                try:
                    found.append(_read(watch, replace(calling, slots=Slots(total, axis, dimensions)), state, width))
                except Unfollowed:
                    continue
                except Unreadable as error:
                    problem = problem or error
            if found:
                return _together(found)
    raise problem or Unfollowed("it isn't called with slots of each expert")


def _together(found: list[Reading]) -> Reading:
    """The reading that all of several forms come to."""
    first = found[0]
    if any((other.spec, other.layout) != (first.spec, first.layout) for other in found):
        raise Unreadable("its experts compute something else of slots in another form")
    slots = [reading.calling.slots for reading in found]
    [one, *others] = [form for form in slots if form is not None]
    return replace(first, calling=replace(first.calling, slots=replace(one, others=tuple(others))))


def _read(watch: Watch, calling: Calling, state: dict[str, Tensor], width: int) -> Reading:
    slots = calling.slots
    assert slots is not None
    own = own_dtype(state) or torch.float32
    few = odd_batch(state, 1, slots.experts)
    more = odd_batch(state, few[0] * few[1] + 1, slots.experts)
    records = [
        _record(watch, calling, few, width, torch.bfloat16),
        _record(watch, calling, more, width, torch.float32),
        _record(watch, calling, (1, 1), width, own, plain=True),
        _record(watch, calling, few, width, own, plain=True),
    ]
    return of_records(records, calling, state, slots.experts, 1)


def _record(
    watch: Watch, calling: Calling, sizes: tuple[int, int], width: int, dtype: torch.dtype, *, plain: bool = False
) -> Record:
    assert calling.slots is not None
    lead = calling.slots.sizes(sizes)
    flow = record_slots(watch, calling, (*lead, width), dtype, plain=plain)
    if flow.branches or flow.lone:
        raise Unreadable(f"{DEPENDS} (compares it)")
    return parse_record(_with_ids(flow, calling.slots.ids(lead)), dtype)


def _with_ids(flow: Flow, ids: Tensor) -> Flow:
    """The record as one in which each row chose the expert of its slot, with a weight of 1."""
    ones = Op("input", ("weights",), {"ones": True}, tuple(ids.shape), "float32")
    return replace(flow, ops=(*flow.ops, ones), choices=(Choice(Ref(len(flow.ops)), 1, ids, True),))
