"""Reading a block: from its dataflow to a :class:`~moe_surgery.spec.MoESpec`, refusing whatever isn't accounted for.

The block is recorded several times: with 3-D input (2-D where the block takes no other) in bfloat16 and every token on
the same few experts; with many more tokens in float32 and every expert visited; and, in the dtype of its own weights,
with one token, with a small batch that lies otherwise in memory, and with 2-D input, where the block takes these.
All records must say the same. So a branch on load, batch shape or dtype that one record can't show is seen as a
difference between two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.calling import Calling
from moe_surgery.read.asking import FEW, Asking, crowded_together, rolled, spread, together
from moe_surgery.read.children import children, combine
from moe_surgery.read.own_part import own_part, own_weights
from moe_surgery.read.parse.results import all_say, kept_by_both
from moe_surgery.read.parse.token_output import TokenRead
from moe_surgery.read.parsed import Record, parse_record
from moe_surgery.read.reading import Broken, Mistaken, Outside, Reading, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import Untouched, arguments_of, passed_on, unused, was_touched
from moe_surgery.read.record.attributes import names_read
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.block_run import record
from moe_surgery.read.record.experts_dispatch import own_forward
from moe_surgery.read.record.flow import Flow
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.split import Splitting
from moe_surgery.read.together import but_slots, check_identities, experts_spec, renumbered, same_experts, shared_spec
from moe_surgery.read.unrecorded import check_complete, check_dtypes, check_site
from moe_surgery.read.within import Within
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.weights.layout import Layout

_BATCHES = ((3, 5), (5, 7), (7, 11), (11, 13), (13, 17), (17, 19), (19, 23), (23, 29), (29, 31), (37, 41))
_MANY = 65  # tokens: more than the thresholds that blocks are known to branch at
_LONGEST_PART = 2048  # of a batch that is cut: twice as many tokens are recorded
_ROWS = (67, 2)  # of a batch that a block takes apart row by row


def read(block: nn.Module) -> Reading:
    """What ``block`` computes. No weight is touched; weights may be on the meta device.

    Raises :class:`~moe_surgery.read.reading.Unreadable` with the reason if anything in it can't be accounted for.
    """
    try:
        return _read(block, parse_record)
    except Outside as error:
        try:
            return _read(block, parse_record, inside=True)
        except Unreadable:
            raise error from None


def read_around(block: nn.Module) -> Reading:
    """What ``block`` computes, of which the router is left as it is: its own operations find ids and weights.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    return _read_in_parts(block, Splitting())


def read_within(block: nn.Module) -> Reading:
    """What the routed experts in ``block`` compute, of which all else is left as it is.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    return _read_in_parts(block, Within())


def _read_in_parts(block: nn.Module, parse: Splitting | Within) -> Reading:
    """A block read where it can be cut; the first reason is told, if it can't be anywhere."""
    problem: Unreadable | None = None
    while True:
        try:
            return _read(block, parse)
        except Unreadable as error:
            problem = problem or error
            if not parse.otherwise():
                raise problem from None


def _read(block: nn.Module, parse: Callable[[Flow, torch.dtype], Record], *, inside: bool = False) -> Reading:
    state = check_site(block)
    ask = Asking(block, arguments_of(block, absent=True), parse, inside)
    with own_forward(block):
        try:
            crowded = _first(ask, hidden_sizes(state), state)
        except Unfollowed:
            arguments_of(block)  # which says that it takes more than one tensor
            raise
        split = crowded.record.cut is not None
        check_identities((slot for token in crowded.tokens for slot in token.slots), split)
        first = crowded.record.first
        router = first.router
        width = crowded.width
        own = own_dtype(state) or torch.float32
        cut = crowded.record.cut
        more = crowded.record.ranked > router.top_k and not (cut is not None and cut.computed)
        tokens = max(_MANY, router.num_experts if more else router.num_experts // router.top_k + 1)
        batch = odd_batch(state, tokens, router.num_experts, router.top_k, *crowded.avoid)
        records = [
            crowded.record,
            ask(crowded.shape(batch), torch.float32, rolled if more else spread),
            _of_one(ask, crowded.shape((1, 1)), own, crowded.record),
        ]
        calling = _without_effect(ask, crowded.shape((1, 1)), own, records[-1])
        records += ask.if_it_takes(crowded.shape(FEW), own, plain=True)
        few = odd_batch(state, 16, router.num_experts, router.top_k, *crowded.avoid)
        records += ask.if_it_takes((few[0] * few[1], width), own)
        if any(record_.lone for record_ in records) and not crowded.flat:
            records += [_of_one(ask, shape, own, crowded.record) for shape in ((1, 6, width), (6, 1, width))]
        if any(record_.one_by_one for record_ in records):  # the number of a row may be branched on unseen
            records.append(ask(crowded.shape(_ROWS), own, spread, plain=True))
        if beyond := {end for record_ in records for end, _ in record_.beyond}:
            records += _of_parts(ask, crowded, beyond, own)
        if first.on_input and split:
            raise Unreadable("its experts weight their inputs")
        # What differs there decides, and not what follows.
        experts = same_experts(records, first, router.num_experts, split=split)
        numbers = renumbered(experts)
        program = own_part(ask, records, crowded.shape(few), crowded.shape(batch), own, numbers)
    check_identities(experts, split)
    layout = Layout(
        router=router.piece,
        experts=tuple(expert.pieces for expert in experts if expert is not None and not expert.identity),
        shared=first.shared.mlp.pieces if first.shared else None,
        shared_gate=first.shared.gate if first.shared else None,
        router_bias=router.bias,
        correction_bias=router.correction,
        output_bias=first.output_bias,
    )
    if router.groups and router.groups.chosen * router.num_experts // router.groups.count < router.top_k:
        raise Unreadable(f"the {router.groups.chosen} groups it chooses hold fewer than {router.top_k} experts")
    # How it rounds shows in half precision, or in the dtype of its own weights if that isn't float32.
    precisions = (first if own == torch.float32 else records[2].first).precisions
    if router.correction and precisions.scores == "native" and state[router.correction.path].dtype != own:
        raise Unreadable("its correction bias is of another dtype than the scores that it is added to")
    spec = MoESpec(
        hidden=width,
        router=RouterSpec(
            num_experts=router.num_experts,
            top_k=router.top_k,
            scoring=router.scoring,
            renormalize=router.renormalize,
            scale=router.scale,
            logits_dtype=precisions.logits,
            weights_dtype=precisions.weights,
            scores_dtype=precisions.scores,
            bias=router.bias is not None,
            soft_cap=router.soft_cap,
            correction_bias=router.correction is not None,
            groups=router.groups,
            epsilon=router.epsilon,
            floor=router.floor,
            norm=router.norm,
            ranks=router.ranks,
            ranked_dtype=precisions.ranked,
            cap_dtype=precisions.cap,
            wide_matrix=check_dtypes(state, layout),
        ),
        experts=experts_spec(experts, first),
        shared=shared_spec(first.shared),
        output_bias=first.output_bias is not None,
        own_rest=crowded.record.cut is not None and crowded.record.cut.routed is not None,
        latent=crowded.record.inner if crowded.record.inner != width else None,
    )
    spare = frozenset(state).difference(*(record_.used for record_ in records))
    if "training" not in names_read(block):  # nothing says what else they could be for
        spare = frozenset()
    own_code = own_weights(program, layout)
    check_complete({name: tensor for name, tensor in state.items() if name not in spare | own_code}, layout)
    results = all_say((record_.results, record_.lead) for record_ in records)
    spec = replace(spec, results=str(results or ""))
    kept = reduce(kept_by_both, [record_.kept for record_ in records])
    above = layout.correction_bias if router.above_zero else None
    return Reading(
        spec,
        layout,
        combine(spec, layout),
        children(spec, layout),
        "",
        calling,
        results,
        tuple(kept.items()),
        above,
        spare,
        program,
    )


def hidden_sizes(state: dict[str, Tensor]) -> list[int]:
    """The sizes that the input's last dimension may have, likeliest first: those most weights share."""
    count: Counter[int] = Counter()
    for tensor in state.values():
        if tensor.ndim >= 2:
            count.update(set(tensor.shape[-2:]))
    return [size for size, _ in count.most_common()]


def odd_batch(state: dict[str, Tensor], tokens: int, *avoid: int) -> tuple[int, int]:
    """A batch of at least ``tokens`` tokens whose sizes are mistaken for no other size in the block.

    One more than a size is a size too: of one-hot masks with a class for no expert.
    """
    sizes = {size + more for tensor in state.values() for size in tensor.shape for more in (0, 1)} | set(avoid)
    for first, second in _BATCHES:
        if first * second >= tokens and not {first, second, first * second} & sizes:
            return first, second
    raise Unreadable("no batch to probe it with differs from all of its sizes")


@dataclass(frozen=True)
class _Crowded:
    record: Record
    width: int
    flat: bool
    avoid: frozenset[int]

    def shape(self, batch: tuple[int, int]) -> tuple[int, ...]:
        return _shape(batch, self.width, self.flat)

    @property
    def tokens(self) -> tuple[TokenRead, ...]:
        return self.record.tokens


def _of_one(ask: Asking, shape: tuple[int, ...], dtype: torch.dtype, many: Record) -> Record:
    """A record of one token, or one row or column of them, of a block that may do something else with many."""
    try:
        found = ask(shape, dtype, spread, plain=True)
        if not many.lone or but_slots(found.first) == but_slots(many.first):
            return found
    except Unreadable:
        if not many.lone:
            raise
    raise Unreadable(f"{DEPENDS} (asks whether it is one)")


def _of_parts(ask: Asking, crowded: _Crowded, beyond: set[int], dtype: torch.dtype) -> list[Record]:
    """Records of batches so large that they are cut ``beyond`` the others, and that more than once, of whichever size.

    An expert's tokens may be cut too: first all are sent to the same experts, then to each some.
    """
    reason = f"{DEPENDS} (cuts the batch at {min(beyond)})"
    if max(beyond) > _LONGEST_PART:
        raise Unreadable(reason)
    tokens = 2 * max(beyond) + 3
    leads = [(tokens,)] if crowded.flat else [(1, tokens), (tokens, 1)]
    how: dict[str, Any] = {"plain": True, "calling": ask.calling, "inside": ask.inside}
    found = [
        ask.parse(record(ask.block, (*lead, crowded.width), dtype, route, **how), dtype)
        for lead, route in [(leads[0], together), *((lead, rolled) for lead in leads)]
    ]
    reached = {end for record_ in found for end in record_.within}
    left = {end for end, size in found[0].beyond if size}
    if beyond - reached or beyond & left:
        raise Unreadable(reason)
    return found


def _without_effect(ask: Asking, shape: tuple[int, ...], dtype: torch.dtype, like: Record) -> Calling:
    """How the block is called; arguments that it only passes on, and that nobody looks at, count as unused."""
    calling = ask.calling
    for argument in passed_on(calling):
        value = Untouched()
        how: dict[str, Any] = {"plain": True, "calling": calling, "more": {argument.name: value}}
        with suppress(Unreadable):
            found = ask.parse(record(ask.block, shape, dtype, spread, **how), dtype)
            if not was_touched(value) and (found.tokens, found.results) == (like.tokens, like.results):
                calling = unused(calling, argument)
    return calling


def _first(ask: Asking, widths: list[int], state: dict[str, Tensor]) -> _Crowded:
    """The first record; it also finds the input's width, the number of experts and top-k, and sizes to avoid.

    With a wrong width the block's own forward fails, unless its code gives the width as a number of which that is a
    multiple: what can't be read with the likeliest width is tried with others in the same way.
    """
    problem = Unfollowed("it has no weights", -1)
    deciding: tuple[Unreadable, torch.dtype, bool] | None = None
    # A block that rounds as it should in its own dtype alone is read in that.
    dtypes = dict.fromkeys((torch.bfloat16, own_dtype(state) or torch.float32))
    avoid: frozenset[int] = frozenset()
    answered: set[bool] = set()  # whether tokens alone, that is
    for dtype, flat, width in product(dtypes, (False, True), widths):
        if deciding is not None and deciding[1:] != (dtype, flat):
            break
        if flat and False in answered:  # it takes batches, and does something else with them
            continue
        if dtype != torch.bfloat16 and not answered:
            break
        try:
            batch = odd_batch(state, 1)
            try:
                found = ask(_shape(batch, width, flat), dtype, crowded_together)
            except Mistaken as error:
                avoid = error.sizes
                batch = odd_batch(state, 1, *avoid)
                found = ask(_shape(batch, width, flat), dtype, crowded_together)
            router = found.first.router
            known = odd_batch(state, 1, router.top_k, router.num_experts, *avoid)
            if known != batch:  # the batch could have been mistaken for top-k
                found = ask(_shape(known, width, flat), dtype, crowded_together)
            return _Crowded(found, width, flat, avoid)
        except Unfollowed as error:
            answered |= {flat} if error.answered else set()
            problem = error if error.operations > problem.operations else problem  # it came further
        except Broken:
            raise
        except Unreadable as error:
            deciding = deciding or (error, dtype, flat)
    raise problem if deciding is None else deciding[0]


def _shape(batch: tuple[int, int], width: int, flat: bool) -> tuple[int, ...]:
    """The shape of a batch, or of its tokens alone for blocks that take nothing else."""
    return (batch[0] * batch[1], width) if flat else (*batch, width)
