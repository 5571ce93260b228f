"""The batches that a block is recorded with: of its width, mistaken for no size in it, and as large as it takes."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import prod
from operator import ne

import torch
from torch import Tensor

from moe_surgery.form import Form
from moe_surgery.read.asking import Asking, crowded_together, rolled, spread, together
from moe_surgery.read.parse.token_output import TokenRead
from moe_surgery.read.parsed import Record
from moe_surgery.read.reading import Broken, Mistaken, Unfollowed, Unreadable
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.flow import Route
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.together import but_slots

_BATCHES = ((3, 5), (5, 7), (7, 11), (11, 13), (13, 17), (17, 19), (19, 23), (23, 29), (29, 31), (37, 41))
_SIDES = (3, 5, 7, 11, 13, 17, 19)  # of batches with places in several dimensions
_LONGEST_PART = 2048  # of a batch that is cut: twice as many tokens are recorded


def hidden_sizes(state: dict[str, Tensor]) -> list[int]:
    """The sizes that the input's last dimension may have, likeliest first: those most weights share."""
    count: Counter[int] = Counter()
    for tensor in state.values():
        if tensor.ndim >= 2:
            count.update(set(tensor.shape[-2:]))
    return [size for size, _ in count.most_common()]


def odd_batch(
    state: dict[str, Tensor],
    tokens: int,
    *avoid: int,
    form: Form | None = None,
    unlike: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """A batch of at least ``tokens`` tokens whose sizes are mistaken for no other size in the block.

    One more than a size is a size too: of one-hot masks with a class for no expert. In a ``form`` with places in
    several dimensions the sizes of these are sizes of the batch; each is another than in the batch ``unlike`` it.
    """
    sizes = {size + more for tensor in state.values() for size in tensor.shape for more in (0, 1)} | set(avoid)
    for sides in _BATCHES if form is None or form.places == 1 else _batches_of(form):
        made = set(_products(sides))
        told = unlike is None or form is None or all(map(ne, _products(sides), _of_form(form, unlike)))
        if prod(sides) >= tokens and not made & sizes and told:
            return sides[0], prod(sides[1:])
    raise Unreadable("no batch to probe it with differs from all of its sizes")


def _products(sides: tuple[int, ...]) -> list[int]:
    """Some sizes, and the products of some of them."""
    return [prod(some) for count in range(1, len(sides) + 1) for some in combinations(sides, count)]


def _of_form(form: Form, batch: tuple[int, int]) -> list[int]:
    """The sizes of a batch in a ``form``, and the products of some of them."""
    return _products((batch[0], *form.sides(batch[1])))


def _batches_of(form: Form) -> list[tuple[int, ...]]:
    """The sizes of batches and of their places in a ``form``, fewest tokens first."""
    found = {(rows, *form.sides(prod(others))) for rows, *others in permutations(_SIDES, form.places + 1)}
    return sorted(found, key=lambda sides: (prod(sides), sides))


@dataclass(frozen=True)
class Crowded:
    """The first record of a block, every token of it on the same few experts, and what it found out.

    ``width`` is the input's last dimension; ``flat`` says that the block takes tokens alone; sizes in ``avoid`` are
    those that the code gives as plain numbers.
    """

    record: Record
    width: int
    flat: bool
    avoid: frozenset[int]

    def shape(self, batch: tuple[int, int]) -> tuple[int, ...]:
        return _shape(batch, self.width, self.flat)

    @property
    def tokens(self) -> tuple[TokenRead, ...]:
        return self.record.tokens


def crowded_record(ask: Asking, widths: list[int], state: dict[str, Tensor]) -> Crowded:
    """The first record; it also finds the input's width, the number of experts and top-k, and sizes to avoid.

    With a wrong width the block's own forward fails, unless its code gives the width as a number of which that is a
    multiple: what can't be read with the likeliest width is tried with others in the same way.
    """
    problem = Unfollowed("it has no weights", -1)
    deciding: tuple[Unreadable, torch.dtype, bool] | None = None
    # A block that rounds as it should in its own dtype alone is read in that.
    dtypes = dict.fromkeys((torch.bfloat16, own_dtype(state) or torch.float32))
    avoid, form = frozenset[int](), ask.calling.form
    answered: set[bool] = set()  # whether tokens alone, that is
    of_dtypes = False  # what it fails at in another dtype than its own
    for dtype, flat, width in product(dtypes, (False, True), widths):
        if deciding is not None and deciding[1:] != (dtype, flat):
            break
        if flat and (form is not None or False in answered):  # it takes batches, and does something else with them
            continue
        if dtype != torch.bfloat16 and not answered and not of_dtypes:
            break
        try:
            batch = odd_batch(state, 1, form=form)
            try:
                found = ask(_shape(batch, width, flat), dtype, crowded_together)
            except Mistaken as error:
                avoid = error.sizes
                batch = odd_batch(state, 1, *avoid, form=form)
                found = ask(_shape(batch, width, flat), dtype, crowded_together)
            router = found.first.router
            known = odd_batch(state, 1, router.top_k, router.num_experts, *avoid, form=form)
            if known != batch:  # the batch could have been mistaken for top-k
                found = ask(_shape(known, width, flat), dtype, crowded_together)
            return Crowded(found, width, flat, avoid)
        except Unfollowed as error:
            answered |= {flat} if error.answered else set()
            of_dtypes |= any(word in str(error) for word in ("dtype", "BFloat16"))
            problem = error if error.operations > problem.operations else problem  # it came further
        except Broken:
            raise
        except Unreadable as error:
            deciding = deciding or (error, dtype, flat)
    raise problem if deciding is None else deciding[0]


def in_float32(ask: Asking, shape: tuple[int, ...], own: torch.dtype, route: Route) -> Record:
    """A record in float32, or in a block's ``own`` dtype where it can be read in that alone, as it converts to it."""
    try:
        return ask(shape, torch.float32, route)
    except Unreadable:
        if own == torch.float32:
            raise
        with suppress(Unreadable):
            return ask(shape, own, route)
        raise


def record_of_one(ask: Asking, shape: tuple[int, ...], dtype: torch.dtype, many: Record) -> Record:
    """A record of one token, or one row or column of them, of a block that may do something else with many."""
    try:
        found = ask(shape, dtype, spread, plain=True)
        if not many.lone or but_slots(found.first) == but_slots(many.first):
            return found
    except Unreadable:
        if not many.lone:
            raise
    raise Unreadable(f"{DEPENDS} (asks whether it is one)")


def records_of_parts(ask: Asking, crowded: Crowded, beyond: set[int], dtype: torch.dtype) -> list[Record]:
    """Records of batches so large that they are cut ``beyond`` the others, and that more than once, of whichever size.

    An expert's tokens may be cut too: first all are sent to the same experts, then to each some.
    """
    reason = f"{DEPENDS} (cuts the batch at {min(beyond)})"
    if max(beyond) > _LONGEST_PART:
        raise Unreadable(reason)
    tokens = 2 * max(beyond) + 3
    leads = [(tokens,)] if crowded.flat else [(1, tokens), (tokens, 1)]
    found = [
        ask.parse(ask.record((*lead, crowded.width), dtype, route, plain=True), dtype)
        for lead, route in [(leads[0], together), *((lead, rolled) for lead in leads)]
    ]
    reached = {end for record_ in found for end in record_.within}
    left = {end for end, size in found[0].beyond if size}
    if beyond - reached or beyond & left:
        raise Unreadable(reason)
    return found


def _shape(batch: tuple[int, int], width: int, flat: bool) -> tuple[int, ...]:
    """The shape of a batch, or of its tokens alone for blocks that take nothing else."""
    return (batch[0] * batch[1], width) if flat else (*batch, width)
