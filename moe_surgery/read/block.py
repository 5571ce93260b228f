"""Reading a block: from its dataflow to a :class:`~moe_surgery.spec.MoESpec`, refusing whatever isn't accounted for.

The block is recorded several times: with 3-D input (2-D where the block takes no other) in bfloat16 and every token on
the same few experts; with many more tokens in float32 and every expert visited; and, in the dtype of its own weights,
with one token, with a small batch that lies otherwise in memory, and with 2-D input, where the block takes these.
All records must say the same. So a branch on load, batch shape or dtype that one record can't show is seen as a
difference between two.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import nn

from moe_surgery.calling import Calling
from moe_surgery.companion import Companion
from moe_surgery.form import FORMS, IMAGES
from moe_surgery.read.asking import FEW, Asking, Records, rolled, spread
from moe_surgery.read.batches import (
    crowded_record,
    hidden_sizes,
    in_float32,
    odd_batch,
    record_of_one,
    records_of_parts,
)
from moe_surgery.read.children import children, combine
from moe_surgery.read.companions import with_companions, with_others_alike
from moe_surgery.read.other_forms import check_arguments, check_images, in_a_form, takes_images
from moe_surgery.read.own_part import own_part, own_weights
from moe_surgery.read.parse.results import all_say, constants, kept_by_all
from moe_surgery.read.parsed import Record, parse_record
from moe_surgery.read.reading import VALUES, Outside, Reading, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import Untouched, arguments_of, passed_on, unused, was_touched, with_one_more
from moe_surgery.read.record.attributes import names_read
from moe_surgery.read.record.experts_dispatch import own_forward
from moe_surgery.read.record.flow import Flow
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.split import Splitting
from moe_surgery.read.together import (
    adds_inputs,
    check_identities,
    experts_spec,
    layout_of,
    renumbered,
    router_spec,
    same_experts,
    shared_spec,
    with_inputs,
)
from moe_surgery.read.unrecorded import check_complete, check_dtypes, check_site
from moe_surgery.read.within import Within
from moe_surgery.spec import MoESpec

_MANY = 65  # tokens: more than the thresholds that blocks are known to branch at
_ROWS = (67, 2)  # of a batch that a block takes apart row by row


def read(block: nn.Module, records: Records | None = None) -> Reading:
    """What ``block`` computes. No weight is touched; weights may be on the meta device.

    ``records`` are those that were made of it before, where it is read in several ways.

    Raises :class:`~moe_surgery.read.reading.Unreadable` with the reason if anything in it can't be accounted for.
    """
    records = records or Records(block)
    try:
        return _read(records, parse_record)
    except Outside as error:
        try:
            return _read(records, parse_record, inside=True)
        except Unreadable:
            raise error from None


def read_around(block: nn.Module, records: Records | None = None) -> Reading:
    """What ``block`` computes, of which the router is left as it is: its own operations find ids and weights.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    return _read_beside(records or Records(block), Splitting)


def read_within(block: nn.Module, records: Records | None = None) -> Reading:
    """What the routed experts in ``block`` compute, of which all else is left as it is.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    return _read_beside(records or Records(block), Within)


def read_told(block: nn.Module, fits: Callable[[Companion], bool]) -> Reading:
    """What ``block`` computes of its input and of a tensor beside it, of a form that ``fits``, which it can do without.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    records, problem = Records(block), Unreadable("it takes no such tensor beside its input")
    callings = with_companions(block, arguments_of(block, absent=True))
    wanted = (calling for calling in callings if all(map(fits, calling.companions)))
    for calling, parse in product(wanted, (Splitting, Within)):
        try:
            return _told(records, parse, calling)
        except Unreadable as error:
            problem = error
    raise problem


def read_in_form(block: nn.Module, dimensions: int) -> Reading:
    """What ``block`` computes of an input of so many ``dimensions``, such as images, if it reads others otherwise.

    Raises :class:`~moe_surgery.read.reading.Unreadable` as :func:`read` does.
    """
    records, problem = Records(block), Unreadable(f"it takes no input of {dimensions} dimensions")
    for form in (form for form in FORMS if form.dimensions == dimensions):
        calling = replace(arguments_of(block, absent=True), form=form)
        try:
            return _read(records, parse_record, calling=calling)
        except Unreadable as error:
            problem = error
        for parse in (Splitting(), Within()):
            with suppress(Unreadable):
                return _read_in_parts(records, parse, calling)
    raise problem


def _told(records: Records, parse: type[Splitting | Within], calling: Calling) -> Reading:
    return with_others_alike(
        _read_in_parts(records, parse(), calling), lambda calling: _read_in_parts(records, parse(), calling)
    )


def _read_beside(records: Records, parse: type[Splitting | Within]) -> Reading:
    """A block read in parts; one that fails without what it takes beside its input, with tensors of some form there."""
    try:
        return _read_in_parts(records, parse())
    except Unfollowed as error:
        problem: Unreadable = error
    for calling in with_companions(records.block, arguments_of(records.block, absent=True)):
        try:
            return _told(records, parse, calling)
        except Unreadable as error:
            # Of forms that it doesn't take, or numbers that are no token ids, the reason is none of the block's.
            vague = isinstance(problem, Unfollowed) or str(problem).startswith(VALUES)
            problem = error if vague and not isinstance(error, Unfollowed) else problem
    raise problem


def _read_in_parts(records: Records, parse: Splitting | Within, calling: Calling | None = None) -> Reading:
    """A block read where it can be cut; the first reason is told, if it can't be anywhere."""
    problem: Unreadable | None = None
    while True:
        try:
            return _read(records, parse, calling=calling)
        except Unreadable as error:
            problem = problem or error
            if not parse.otherwise():
                raise problem from None


def _read(
    records: Records,
    parse: Callable[[Flow, torch.dtype], Record],
    *,
    inside: bool = False,
    calling: Calling | None = None,
) -> Reading:
    block = records.block
    state = check_site(block)
    ask = Asking(records, calling or arguments_of(block, absent=True), parse, inside)
    with own_forward(block):
        try:
            crowded = crowded_record(ask, hidden_sizes(state), state)
        except Unfollowed as error:
            if isinstance(error.__cause__, IndexError) and (longer := with_one_more(ask.calling)) is not None:
                return _read(records, parse, inside=inside, calling=longer)
            # Where all but the experts goes on as it is, images aren't tried: it seldom succeeds, and takes long.
            forms = [form for form in FORMS if form.places == 1 or not isinstance(parse, Within)]
            found = in_a_form(ask, error, forms, lambda other: _read(records, parse, inside=inside, calling=other))
            if found is not None:
                return found
            if calling is None:
                check_arguments(ask, state, error)
            raise
        cut = crowded.record.cut
        split = cut is not None
        check_identities((slot for token in crowded.tokens for slot in token.slots), split)
        first = crowded.record.first
        router = first.router
        width, form = crowded.width, ask.calling.form
        own = own_dtype(state) or torch.float32
        more = crowded.record.ranked > router.top_k and not (cut is not None and cut.computed)
        tokens = max(_MANY, router.num_experts if more else router.num_experts // router.top_k + 1)
        few = odd_batch(state, 16, router.num_experts, router.top_k, *crowded.avoid, form=form)
        batch = odd_batch(state, tokens, router.num_experts, router.top_k, *crowded.avoid, form=form, unlike=few)
        made = [
            crowded.record,
            in_float32(ask, crowded.shape(batch), own, rolled if more else spread),
            record_of_one(ask, crowded.shape((1, 1)), own, crowded.record),
        ]
        calling = _without_effect(ask, crowded.shape((1, 1)), own, made[-1])
        made += ask.if_it_takes(crowded.shape(FEW), own, plain=True)
        made += ask.if_it_takes((few[0] * few[1], width), own) if form is None else []
        if form is None and not crowded.flat:
            check_images(ask, width, own)
        if any(record_.lone for record_ in made) and not crowded.flat:
            made += [record_of_one(ask, shape, own, crowded.record) for shape in ((1, 6, width), (6, 1, width))]
        if any(record_.one_by_one for record_ in made):  # the number of a row may be branched on unseen
            views = not ask.takes(crowded.shape(_ROWS), own, plain=True)  # no batch that lies otherwise in memory
            rows = [(prod(_ROWS), 1), (1, prod(_ROWS))] if views else [_ROWS]
            made += [ask(crowded.shape(batch), own, spread, plain=True) for batch in rows]
        if beyond := {end for record_ in made for end, _ in record_.beyond}:
            made += records_of_parts(ask, crowded, beyond, own)
        if first.on_input and split:
            raise Unreadable("its experts weight their inputs")
        # What differs there decides, and not what follows.
        experts = same_experts(made, first, router.num_experts, split=split)
        numbers = renumbered(experts)
        program = own_part(ask, made, crowded.shape(few), crowded.shape(batch), own, numbers)
        if form is None and program is None and not crowded.flat:
            batch = odd_batch(state, 1, router.num_experts, router.top_k, *crowded.avoid, form=IMAGES)
            if takes_images(ask, made, batch, width, own):
                calling = replace(calling, dimensions=calling.dimensions | {IMAGES.dimensions})
    check_identities(experts, split)
    layout = layout_of(first, experts)
    if router.groups and router.groups.chosen * router.num_experts // router.groups.count < router.top_k:
        raise Unreadable(f"the {router.groups.chosen} groups it chooses hold fewer than {router.top_k} experts")
    # How it rounds shows in half precision, or in the dtype of its own weights if that isn't float32.
    precisions = (first if own == torch.float32 else made[2].first).precisions
    if router.correction and precisions.scores == "native" and state[router.correction.path].dtype != own:
        raise Unreadable("its correction bias is of another dtype than the scores that it is added to")
    spec = MoESpec(
        hidden=width,
        router=router_spec(router, precisions, wide_matrix=check_dtypes(state, layout)),
        experts=experts_spec(experts, first),
        shared=shared_spec(first.shared),
        output_bias=first.output_bias is not None,
        own_rest=cut is not None and cut.routed is not None,
        latent=crowded.record.inner if crowded.record.inner != width else None,
    )
    if adds_inputs(experts):
        assert program is not None  # where it has a router of its own, its experts are none of these
        spec, program = with_inputs(spec), program.with_one_more(router.num_experts)
    spare = frozenset(state).difference(*(record_.used for record_ in made))
    absent = any(a.role == "fixed" and not a.many and a.default is None for a in calling.arguments)
    if "training" not in names_read(block) and not absent:
        # Nothing says what else they could be for, but tables of another layer's.
        spare = frozenset(
            name for name in spare if state[name].dtype in (torch.int32, torch.int64) and state[name].ndim == 2
        )
    own_code = own_weights(program, layout)
    check_complete({name: tensor for name, tensor in state.items() if name not in spare | own_code}, layout)
    results = all_say((record_.results, record_.lead) for record_ in made)
    spec = replace(spec, results=str(results or ""))
    lone = any(record_.lone for record_ in made)
    kept = kept_by_all(((record_.kept, record_.lead) for record_ in made), lone)
    kept = constants(kept, dict(block.named_modules()))
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


def _without_effect(ask: Asking, shape: tuple[int, ...], dtype: torch.dtype, like: Record) -> Calling:
    """How the block is called; arguments that it only passes on, and that nobody looks at, count as unused."""
    calling = ask.calling
    for argument in passed_on(calling):
        value = Untouched()
        with suppress(Unreadable):
            flow = ask.record(shape, dtype, spread, plain=True, calling=calling, more={argument.name: value})
            found = ask.parse(flow, dtype)
            if not was_touched(value) and (found.tokens, found.results) == (like.tokens, like.results):
                calling = unused(calling, argument)
    return calling
