"""Reading the module of routed experts alone, where the block around it can't be read as a whole.

transformers calls such a module with tokens, expert ids and routing weights. What it computes of them is all that a
fused layer needs to know: the model's own router, and all else around it, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from moe_surgery.calling import Calling
from moe_surgery.read.asking import spread
from moe_surgery.read.batches import hidden_sizes, odd_batch
from moe_surgery.read.counts import totals
from moe_surgery.read.parsed import Record, parse_record
from moe_surgery.read.reading import VALUES, ChildShape, Reading, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import arguments_of, weights_first
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.block_run import record_experts
from moe_surgery.read.record.experts_dispatch import own_forward
from moe_surgery.read.record.state import Watch
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.together import adds_inputs, experts_spec, renumbered, same_experts
from moe_surgery.read.unrecorded import check_complete, check_dtypes, check_site
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.weights.layout import Layout, Piece

_MANY = 65
_MOST_BEYOND = 1 << 12


def experts_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside ``block`` that may be experts alone: with weights, and called with three tensors."""
    for path, module in block.named_modules():
        if path and any(True for _ in module.parameters()) and _takes_three(module):
            yield path, module


def _takes_three(module: nn.Module) -> bool:
    try:
        arguments_of(module, 3)
    except (Unreadable, ValueError, TypeError):
        return False
    return True


def read_experts(module: nn.Module) -> Reading:
    """What a module of experts computes of tokens [T, H], expert ids [T, k] and routing weights [T, k].

    It may be told masks [T, k, E] instead of ids.
    Raises :class:`~moe_surgery.read.reading.Unreadable` with the reason if anything in it can't be accounted for.
    """
    state = check_site(module, inputs=3)
    calling = replace(arguments_of(module, 3), dimensions=frozenset([2]))
    with own_forward(module):
        watch = Watch(module)
        try:
            return _read(watch, calling, state)
        except Unreadable as error:
            try:  # some take routing weights before ids
                return _read(watch, weights_first(calling), state)
            except Unreadable as other:
                if isinstance(error, Unfollowed):
                    with suppress(Unreadable):
                        return _read(watch, calling, state, by_masks=True)
                vague = str(error).startswith(VALUES)  # as where weights are compared with numbers, like ids
                further = vague and not isinstance(other, Unfollowed)
                raise (other if _further(other) > _further(error) or further else error) from None


def _read(watch: Watch, calling: Calling, state: dict[str, Tensor], *, by_masks: bool = False) -> Reading:
    """The reading with the sizes that fit: of the input's width, and of how many experts there are."""
    problem: Unreadable = Unfollowed("it has no weights that experts could have", -1)
    for width in hidden_sizes(state):
        for total in totals(watch.block, state):
            told = replace(calling, masks=total) if by_masks else calling
            try:
                _try_out(watch, told, width, total)
                return _of_size(watch, told, state, width, total)
            except Unreadable as error:
                problem = error if _further(error) > _further(problem) else problem
    raise problem


def _try_out(watch: Watch, calling: Calling, width: int, total: int) -> None:
    """Raise :class:`Unreadable` if the last of so many experts is none: most wrong sizes show at once."""
    few = min(2, total)
    ids = torch.tensor([[total - 1, 0][:few]] * 3)
    record = _record(watch, calling, width, ids, torch.bfloat16, torch.bfloat16, plain=True)
    if any(slot is not None and slot.identity for token in record.tokens for slot in token.slots):
        raise Unreadable("some of its experts return their input")


def _of_size(watch: Watch, calling: Calling, state: dict[str, Tensor], width: int, total: int) -> Reading:
    few = min(2, total)
    own = own_dtype(state) or torch.float32
    batch = odd_batch(state, max(_MANY, total // min(3, total) + 1), total, few)
    count = batch[0] * batch[1]
    k = min(3, total)
    records = [
        _record(watch, calling, width, spread(count, total, k), torch.float32, torch.float32),
        _record(watch, calling, width, spread(1, total, min(2, total))[:1], own, own, plain=True),
        _record(watch, calling, width, spread(7, total, few), torch.bfloat16, torch.bfloat16),
    ]
    with suppress(Unfollowed):  # some modules take no single choice
        records.append(_record(watch, calling, width, spread(7, total, 1), torch.bfloat16, torch.float32))
    kind = partial(_kind, watch, calling, width, own)
    identities = _beyond(total, kind)
    calling = replace(calling, last=kind(-1) not in ("none", "error"))
    return of_records(records, calling, state, total, min(2, total), identities)


def of_records(
    records: list[Record], calling: Calling, state: dict[str, Tensor], total: int, top_k: int, identities: int = 0
) -> Reading:
    """The reading of a module of ``total`` experts that all ``records`` are of, called with ``top_k`` ids of a token.

    Raises :class:`Unreadable` where it is more than the weighted sum of its experts.
    """
    first, width = records[0].first, records[0].shape[-1]
    if any(record.results is not None for record in records):
        raise Unreadable("its experts return more than one tensor")
    if kept := sorted(name for record in records for _, name in record.kept):
        raise Unreadable(f"its experts write to {kept[0]} in every call")
    if first.shared is not None or first.output_bias is not None:
        raise Unreadable("its experts add what has no routing weight")
    if first.on_input:
        raise Unreadable("its experts weight their inputs")
    experts = same_experts(records, first, total)
    if renumbered(experts) != tuple(range(total)):
        raise Unreadable("its identity experts aren't its last ones")
    if adds_inputs(experts):
        raise Unreadable("its experts add their input to what they make")
    layout = Layout(router=Piece(""), experts=tuple(expert.pieces for expert in experts if expert is not None))
    check_complete(state, layout, range(total, total + identities))
    check_dtypes(state, layout)
    found = replace(experts_spec(experts, first), identities=identities)
    spec = MoESpec(
        hidden=width,
        router=RouterSpec(total + identities, top_k, "own", renormalize=False, scale=first.router.scale),
        experts=found,
        shared=None,
        at="experts",
    )
    shape = ChildShape("experts", (total, found.width, width))
    return Reading(spec, layout, "experts", (("experts", shape),), calling=calling)


def _further(problem: Unreadable) -> float:
    """How far reading came, that of all sizes tried the reason of the likeliest is given."""
    return problem.operations if isinstance(problem, Unfollowed) else float("inf")


def _record(
    watch: Watch,
    calling: Calling,
    width: int,
    ids: Tensor,
    dtype: torch.dtype,
    weights: torch.dtype,
    *,
    plain: bool = False,
) -> Record:
    flow = record_experts(watch, calling, width, ids, dtype, weights, plain=plain)
    if flow.branches:
        raise Unreadable(f"{DEPENDS} (compares it with {flow.branches[0].rpartition(' ')[2]})")
    return parse_record(flow, dtype)


def _kind(watch: Watch, calling: Calling, width: int, dtype: torch.dtype, expert: int) -> str:
    """What an id is that stands for no expert with weights: "error", "none", "identity" or "other"."""
    ids = torch.tensor([[expert, 0], [expert, expert]])
    try:
        [one, both] = _record(watch, calling, width, ids, dtype, torch.float32, plain=True).tokens
    except Unfollowed:
        return "error"
    slot = one.slots[0]
    if slot is None and (any(both.slots) or both.shared or both.output_bias):
        raise Unreadable("a token that goes to no expert isn't left out")
    return "none" if slot is None else "identity" if slot.identity else "other"


def _beyond(total: int, kind: Callable[[int], str]) -> int:
    """How many ids beyond the experts stand for experts that return their input.

    An id beyond those stands for none, or is an error, in the module as in its replacement; ``kind`` says which.
    """
    first = kind(total)
    if first in ("error", "none"):
        after = "none" if first == "error" else kind(total + 1)
        if after in ("error", "none"):
            return 0
        raise Unreadable(f"id {total + 1}, beyond its {total} experts, is an expert of another kind")
    if first == "other":
        raise Unreadable(f"id {total}, beyond its {total} experts, is an expert of another kind")
    low, high = 1, 2  # low ids beyond are identities; is the one before high?
    while high <= _MOST_BEYOND and kind(total + high - 1) == "identity":
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kind(total + middle - 1) == "identity" else (low, middle)
    if kind(total + low) not in ("error", "none"):
        raise Unreadable(f"id {total + low}, beyond its experts, is an expert of another kind")
    return low
