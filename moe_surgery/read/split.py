"""A block split where its routing is done: expert ids and routing weights, whatever they come of, meet the experts.

Of a record this makes one in which some tensor on the way is taken as given: the routing weights, [T, k] beside the ids
of a top-k. If the rest of the record is routed experts and a shared expert, the block can be split there: its own code
finds ids and weights, as it always did, and the experts are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import prod
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from moe_surgery.read.meaning.interpreter import Interpreter
from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.parse.above_zero import check_above_zero
from moe_surgery.read.parse.token_output import TokenRead
from moe_surgery.read.parsed import Cut, Record, parse_record
from moe_surgery.read.program import Builder
from moe_surgery.read.reading import Silent, Unreadable
from moe_surgery.read.record.choices import Made
from moe_surgery.read.record.flow import Choice, Flow, Given, Op, Ref
from moe_surgery.read.record.lineage import Chosen, Computed, calculated, chosen, sources

_MOST_ORIGINS, _MOST_CHOSEN = 256, 64
_MOST_LEFT_OUT = 2
Way = TypeVar("Way", bound=tuple[Any, ...])
_MADE = frozenset(["input", "beside", "const", "param"])


@dataclass(eq=False)
class Trying:
    """What was found in the records of one block so far: ``found`` is where they were cut, which is tried first.

    Few tokens may tell less than many. Where a cut turns out to be wrong, the block is read again without it.
    """

    found: tuple[Any, ...] = ()
    left_out: set[tuple[Any, ...]] = field(default_factory=set)

    def otherwise(self) -> bool:
        """Whether there is something else to try. What was found is left out from now on."""
        if not self.found or len(self.left_out) == _MOST_LEFT_OUT:
            return False
        self.left_out.add(self.found)
        self.found = ()
        return True

    def first_whole(self, ways: Iterable[Way], parsed: Callable[[Way], Record | None]) -> Record | None:
        """What is ``parsed`` in the first of some ways, each with its name, that leaves out no expert.

        Where all do, it is the first that says anything; then none is tried any more but that of the records before.
        """
        partial: Record | None = None
        for way in sorted((way for way in ways if way[0] not in self.left_out), key=lambda way: way[0] != self.found):
            if partial is not None and way[0] != self.found:
                break
            found = parsed(way)
            if found is not None and not may_be_partial(found):
                self.found = self.found or way[0]
                return found
            partial = partial or found
        return partial


class Splitting(Trying):
    """Parses the records of one block that is split at its ids and weights.

    Of one token, a weight on its way to an expert looks like all weights: those that are found in the first record's
    place are tried first, and what leaves out no expert is taken rather than what does.
    """

    weights: int | None = -1

    def __call__(self, flow: Flow, dtype: torch.dtype) -> Record:
        """What a record says of every token.

        Raises :class:`~moe_surgery.read.reading.Unreadable` if there is no place to split it at.
        """
        problem, silent = Unreadable("its router makes no weights for the experts that it chooses"), False
        check_positive(flow)

        def parsed(way: tuple[tuple[Any, ...], Cut]) -> Record | None:
            nonlocal problem, silent
            split, _ = given_weights(flow, way[1])
            try:
                return of_cut(parse_record(split, dtype), flow, way[1])
            except Unreadable as error:
                problem, silent = error, silent or isinstance(error, Silent)
            return None

        others = sorted(chain(cuts(flow), _unweighted(flow)), key=lambda cut: cut.weights != self.weights)
        first, found = not self.found, self.first_whole(((cut.kind, cut) for cut in others), parsed)
        if found is None:
            raise Silent(str(problem)) if silent else problem
        if first and self.found and found.cut is not None:
            self.weights = found.cut.weights
        return found


def may_be_partial(found: Record) -> bool:
    """Whether a record, of one token, leaves out one of its experts, as one does that was cut too late."""
    return len(found.tokens) == 1 and None in found.tokens[0].slots


def of_cut(found: Record, flow: Flow, cut: Cut) -> Record:
    """What was ``found`` of a record that is split at ``cut``, of ``flow``, which is the record as it was.

    Raises :class:`~moe_surgery.read.reading.Unreadable` if ids don't tell experts apart.
    """
    ids = _ids(flow, cut)
    _check_ids(found, ids)
    experts = _scored(flow, cut)
    tokens = tuple(_of(token, cut.count, experts) for token in found.tokens)
    ranked = sum(flow.choices[number].k for number in cut.choices)
    return replace(found, tokens=tokens, ids=ids, ranked=ranked, cut=cut).with_replayed(flow)


def _of(token: TokenRead, count: int, experts: int) -> TokenRead:
    return replace(token, router=replace(token.router, top_k=count, num_experts=experts))


def _scored(flow: Flow, cut: Cut) -> int:
    """How many experts the choices of a cut are made among."""
    made = [flow.choices[number].made for number in cut.choices]
    if made[0] is not None and made[0].among is not None:
        return made[0].among
    scores = [flow.ops[flow.choices[number].scores.index].shape for number in cut.choices]
    if cut.computed is None:
        return scores[0][-1]
    return prod(torch.Size(shape).numel() // len(_ids(flow, cut)) for shape in scores)


def _check_ids(found: Record, ids: torch.Tensor) -> None:
    """Raise :class:`Unreadable` if ids [T, k] don't tell experts apart: others may, that come of these."""
    if any(len(token.slots) != ids.shape[-1] for token in found.tokens):
        raise Unreadable("it gives weights to more experts than its router chooses")
    pairs = {
        (expert, mlp)
        for token, chosen in zip(found.tokens, ids.tolist(), strict=True)
        for expert, mlp in zip(chosen, token.slots, strict=True)
        if mlp is not None
    }
    weighty = [mlp for _, mlp in pairs if not mlp.identity]
    if len(pairs) != len({expert for expert, _ in pairs}) or len(weighty) != len(set(weighty)):
        raise Unreadable("numbers made of what its router chose aren't those of its experts")


def _ids(flow: Flow, cut: Cut) -> torch.Tensor:
    """The ids [T, k] that the choices of a cut were told to take, or that were calculated from these."""
    if cut.computed is not None:
        computed: torch.Tensor = cut.computed.value
        return computed
    choices = [flow.choices[number] for number in cut.choices]
    return torch.cat([choice.ids.reshape(-1, choice.k) for choice in choices], -1)[:, : cut.count]


def check_positive(flow: Flow) -> None:
    """Raise :class:`Unreadable` if the whole record took numbers for above zero, or for zero, that may be others."""
    if flow.positive:
        check_above_zero(flow, Interpreter(flow, Terms()))


def cuts(flow: Flow) -> Iterator[Cut]:
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
        following = _following(flow, {flow.choices[number].made for number in numbers})
        for place in sorted(following, reverse=True):
            op = flow.ops[place]
            one = ranked == 1 and torch.Size(op.shape).numel() == tokens
            several = len(op.shape) > 1 and 1 < op.shape[-1] <= ranked and op.shape[:-1] in ((tokens,), lead)
            floating = op.name not in _MADE and op.dtype.startswith(("float", "bfloat"))
            if floating and (one or several):
                yield Cut(numbers, place, op.shape[-1] if ranked > 1 else 1)
            if floating and ranked > 1 and op.shape == (ranked, tokens):
                yield Cut(numbers, place, ranked, turned=True)
    for ids, numbers in _computed(flow, tokens):
        count = ids.value.shape[-1]
        following = _following(flow, {flow.choices[number].made for number in numbers})
        for place in sorted(following, reverse=True):
            op = flow.ops[place]
            shaped = op.shape in ((tokens, count), (*lead, count)) or (count == 1 and op.shape in ((tokens,), lead))
            if shaped and op.name not in _MADE and op.dtype.startswith(("float", "bfloat")):
                yield Cut(numbers, place, count, computed=ids)


def _unweighted(flow: Flow) -> Iterator[Cut]:
    """Choices of one expert that may have no weight."""
    return (Cut((number,), None, 1) for number, choice in enumerate(flow.choices) if choice.k == 1)


def _computed(flow: Flow, tokens: int) -> Iterator[tuple[Given, tuple[int, ...]]]:
    """Numbers that may be ids, [T, k], calculated from choices, the last first; and which choices these are."""
    builder = Builder(flow, next(op.shape for op in flow.ops if op.name == "input"))
    places = {choice.made: number for number, choice in enumerate(flow.choices)}
    seen: list[tuple[set[Any], Any]] = [({choice.made}, choice.ids.flatten().tolist()) for choice in flow.choices]
    for origin in islice(calculated(op.origin for op in flow.ops if op.origin is not None), _MOST_ORIGINS):
        made = {source.choice for source in sources([origin]) if isinstance(source, Chosen)}
        if not made or not made <= set(places):
            continue
        value = builder.value(origin)
        listed = value.flatten().tolist()
        if value.is_floating_point() or value.dtype is torch.bool or not listed or len(listed) % tokens:
            continue
        if (made, listed) in seen or min(listed) < 0 or len(listed) // tokens > _MOST_CHOSEN:
            continue
        seen.append((made, listed))
        shape = [tokens, len(listed) // tokens]
        kept = Computed(torch.ops.aten.reshape.default, (origin, shape), {}, None)
        yield Given("ids", value.reshape(shape), (), "", kept), tuple(sorted(places[choice] for choice in made))


def _following(flow: Flow, choices: set[Made | None]) -> set[int]:
    """The operations whose results come of one of some choices, or of the maximum that one of them chose."""
    found: set[int] = set()
    choices = choices | {before for choice in choices if choice is not None for before in _looked_up_by(flow, choice)}
    maxima = {(choice.node, choice.largest) for choice in choices if choice is not None and choice.k == 1}
    for place, op in enumerate(flow.ops):
        known = op.origin is not None and not choices.isdisjoint(chosen([op.origin]))
        made = op.made is not None and (op.made in choices or (op.made.node, op.made.largest) in maxima)
        if known or made or not found.isdisjoint(op.operands):
            found.add(place)
    return found


def _looked_up_by(flow: Flow, choice: Made) -> set[Made]:
    """The choices whose ids a ``choice`` is looked up by in a table."""
    op = next((op for op in flow.ops if op.made is choice), None)
    if op is None or choice.among is None:
        return set()
    return chosen(origin for place in op.operands if (origin := flow.ops[place].origin) is not None)


def given_weights(flow: Flow, cut: Cut) -> tuple[Flow, Callable[[int], int]]:
    """The record with its routing weights as something given, and where each of its operations is in that."""
    place, ids = cut.weights, _ids(flow, cut)
    if place is None:
        ones = Op("input", ("weights",), {"ones": True}, (len(ids), cut.count), "float32")
        choices = (Choice(Ref(len(flow.ops)), cut.count, ids, True),)
        unweighted = replace(flow, ops=(*flow.ops, ones), choices=choices, results=None, kept={}, positive=())
        return unweighted, lambda index: index
    made = flow.ops[place]
    given = Op("input", ("weights",), {}, (len(ids), cut.count), made.dtype)
    shaped = Op("view", (Ref(place), list(made.shape)), {}, made.shape, made.dtype)
    if cut.turned:
        shaped = Op("t", (Ref(place),), {}, made.shape, made.dtype)
    choices = (Choice(Ref(place), cut.count, ids, True),)
    if given.shape == shaped.shape and not cut.turned:
        ops = (*flow.ops[:place], given, *flow.ops[place + 1 :])
        return replace(flow, ops=ops, choices=choices, results=None, kept={}, positive=()), lambda index: index

    def moved(index: int) -> int:
        return index + (index >= place)

    def later(op: Op) -> Op:
        args, kwargs = tree_map_only(Ref, lambda ref: Ref(moved(ref.index)), (op.args, op.kwargs))
        return replace(op, args=args, kwargs=kwargs)

    ops = (*flow.ops[:place], given, shaped, *map(later, flow.ops[place + 1 :]))
    output = Ref(moved(flow.output.index))
    return replace(flow, ops=ops, output=output, choices=choices, results=None, kept={}, positive=()), moved
