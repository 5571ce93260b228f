"""From formulas to what a block returns beside its output: logits, scores, routing weights and ids of its router.

Whatever else it returns its own operations must go on computing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

from torch import Tensor

from moe_surgery.answers import (
    Alone,
    Always,
    Constant,
    OfSeveral,
    Replayed,
    Result,
    ShapeOfInput,
    SizeOfInput,
    Structure,
    Value,
)
from moe_surgery.read.meaning.interpreter import Interpreter
from moe_surgery.read.meaning.rows import vectors
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.parse.router import RouterRead
from moe_surgery.read.parse.token_output import TokenParser
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.attributes import Attributes
from moe_surgery.read.record.flow import Flow, Given
from moe_surgery.spec import RouterSpec

_UNLIKE = object()
_SAME_CHOICE: dict[str, Any] = {"renormalize": False, "scale": 1.0, "epsilon": 0.0, "floor": 0.0, "norm": 1.0}


def parse_results(
    flow: Flow, run: Interpreter, native: str, router: RouterRead, tokens: Sequence[TokenParser], lead: tuple[int, ...]
) -> Structure | None:
    """What a record returns, in terms of its ``router``; ``lead`` are the input's dimensions before the last."""
    if flow.results is None:
        return None
    parser = _Results(flow, run, native, router, tokens, lead)
    return flow.results.mapped(parser.leaf)


class _Results:
    def __init__(
        self,
        flow: Flow,
        run: Interpreter,
        native: str,
        router: RouterRead,
        tokens: Sequence[TokenParser],
        lead: tuple[int, ...],
    ) -> None:
        self.flow, self.run, self.native, self.router, self.tokens, self.lead = flow, run, native, router, tokens, lead

    def leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Given):
            return leaf
        if leaf.value is None:
            return Result("output", frozenset(["native"]), self._leads(leaf))
        try:
            return self._result(leaf)
        except Unreadable:
            return Replayed(leaf.where, leaf.number)

    def _result(self, leaf: Given) -> Result:
        if leaf.number:
            raise Unreadable("a number in Python")
        leads = self._leads(leaf)
        dtypes = {leaf.dtype} | ({"native"} if leaf.dtype == self.native else set())
        if isinstance(leaf.value, Tensor):
            ids = self.flow.choices[self.router.choice].ids[..., : self.router.top_k]
            if leaf.value.numel() != ids.numel() or not bool((leaf.value.reshape(-1) == ids.reshape(-1)).all()):
                raise Unreadable("numbers made of the ids it chooses")
            return Result("ids", frozenset([leaf.dtype]), leads)
        rows = vectors(self.run.rows(leaf.value), self.run.terms).lead.reshape(-1)
        found = {
            self._read(parser, term, number)
            for number, (parser, term) in enumerate(zip(self.tokens, rows, strict=True))
        }
        if len(found) != 1:
            raise Unreadable("it isn't the same for every token")
        value, weighting = found.pop()
        return Result(value, frozenset(dtypes), leads, weighting)

    def _leads(self, leaf: Given) -> frozenset[str]:
        """What stands before the last dimension: all tokens ("flat"), or the input's dimensions ("batch")."""
        known = {"flat": (len(self.tokens),), "batch": self.lead}
        leads = frozenset(name for name, shape in known.items() if leaf.shape[:-1] == shape)
        if not leads or not leaf.shape:
            raise Unreadable(f"its shape {leaf.shape} isn't that of one vector for each token")
        return leads

    def _read(self, parser: TokenParser, term: Term, number: int) -> tuple[Value, RouterSpec | None]:
        bare = parser.bare(term)
        if self._logits(parser, bare):
            return "logits", None
        scored = {"sqrtsoftplus": "sqrt"}.get(self.router.scoring, self.router.scoring)
        if bare.op == scored and self.router.soft_cap is None:
            inner = parser.bare(bare.args[0])
            inner = parser.bare(inner.args[0]) if inner.op == "softplus" else inner
            if self._logits(parser, inner):
                return "scores", None
        terms, router = self.run.terms, self.router
        if bare.size == router.num_experts > router.top_k and bare.op == "vec":
            ids = self.flow.choices[router.choice].ids.reshape(len(self.tokens), -1)[number].tolist()
            rest = [element for place, element in enumerate(bare.args) if place not in ids]
            if any(element.op != "const" or element.args[0] != 0.0 for element in rest):
                raise Unreadable(f"{short(bare)}")
            return "dense weights", self._weighting(parser, [bare.args[place] for place in ids])
        if bare.size == router.top_k:
            return "weights", self._weighting(parser, [terms.elem(term, slot) for slot in range(router.top_k)])
        raise Unreadable(short(bare))

    def _logits(self, parser: TokenParser, term: Term) -> bool:
        """Whether a term is the router's logits, before any soft cap."""
        if self.router.bias is not None:
            parts = [parser.bare(part) for part in term.args] if term.op == "add" else []
            maps = [part for part in parts if part.op == "lin"]
            biases = [part.args[0] for part in parts if part.op == "param"]
            if len(parts) != 2 or len(maps) != 1 or biases != [self.router.bias]:
                return False
            term = maps[0]
        return term.op == "lin" and parser.bare(term.args[0]) is parser.x and term.args[1] == self.router.piece

    def _weighting(self, parser: TokenParser, weights: Sequence[Term]) -> RouterSpec:
        """How the routing weights that are returned come about, each in its slot."""
        reads = [parser.routers.parse(weight, 1.0) for weight in weights]
        mine = replace(self.router, **_SAME_CHOICE)
        for slot, weight in enumerate(reads):
            if weight.slot != slot or replace(weight.read, **_SAME_CHOICE) != mine or weight.read != reads[0].read:
                raise Unreadable(f"weights that aren't those of its choice in their order: {short(weights[slot])}")
        read = reads[0].read
        return RouterSpec(
            read.num_experts,
            read.top_k,
            read.scoring,
            read.renormalize,
            read.scale,
            epsilon=read.epsilon,
            floor=read.floor,
            norm=read.norm,
        )


def all_say(records: Iterable[tuple[Structure | None, tuple[int, ...]]]) -> Structure | None:
    """What records say together, each with the dimensions of its input before the last.

    Raises :class:`Unreadable` if they contradict each other.
    """
    found = reduce(_both_say, [_of_shape(results, lead) for results, lead in records]).mapped(number)
    [output, *others] = found.leaves()
    plain = found.kind is Alone and not others and isinstance(output, Result) and "batch" in output.leads
    return None if plain else found


def _of_shape(results: Structure | None, lead: tuple[int, ...]) -> Structure:
    """An output that has its input's shape, spelled out; of tokens, a block that returns tokens returns it too."""
    leads = ["batch", "flat"] if len(lead) == 1 else ["batch"]
    return results or Structure(Alone, (Result("output", frozenset(["native"]), frozenset(leads)),))


def _both_say(results: Structure, other: Structure) -> Structure:
    found = _met(results, other)
    if not isinstance(found, Structure):
        raise Unreadable(f"it returns {_named(results)} for one batch, {_named(other)} for another")
    return found


def _named(results: Structure) -> str:
    [output, *_] = results.leaves()
    alike = results.kind is Alone and isinstance(output, Result) and "batch" in output.leads
    return "one tensor of its input's shape" if alike else str(results)


def constants(kept: Attributes, modules: Container[str]) -> Attributes:
    """Attributes of which those that were the same number for every input are that number; others are objects'."""

    def settled(path: str, value: Any) -> Any:
        if isinstance(value, OfSeveral):
            return OfSeveral(settled(path, value.value))
        if isinstance(value, Structure):
            return value.mapped(number)
        found = number(value)
        return found if found is value or path in modules else Always(found)

    return {key: settled(key[0], value) for key, value in kept.items()}


def number(leaf: Any) -> Any:
    """A leaf of results; what was the same number for every input is that number."""
    return leaf.value if isinstance(leaf, SizeOfInput) and leaf.value is not None else leaf


def kept_by_all(records: Iterable[tuple[Attributes, tuple[int, ...]]], lone: bool) -> Attributes:
    """The attributes that records wrote, each with the dimensions of its input before the last.

    One that asks whether a token is alone (``lone``) may write some for others only.
    """
    ones: list[Attributes] = []
    others: list[Attributes] = []
    for kept, lead in records:
        (ones if lone and prod(lead) == 1 else others).append(kept)
    both = reduce(kept_by_both, others)
    for one in ones:
        silent = {key: value for key, value in both.items() if key not in one}
        known = {key: value for key, value in both.items() if key in one}
        both = {**kept_by_both(known, one), **{key: OfSeveral(value) for key, value in silent.items()}}
    return both


def kept_by_both(one: Attributes, other: Attributes) -> Attributes:
    """The attributes that two records wrote, with values that fit both."""
    if set(one) != set(other):
        raise Unreadable("it writes other attributes for one batch than for another")
    both = {key: _met(value, other[key]) for key, value in one.items()}
    if unlike := [name for (_, name), value in both.items() if value is _UNLIKE]:
        raise Unreadable(f"it keeps state between calls ({', '.join(unlike)} is another after another batch)")
    return both


def _sized(mine: Any, its: Any) -> Any:
    """What a number is that may be a size of the input, or a multiple of one."""
    one, other = (value.value if isinstance(value, (SizeOfInput, Always)) else value for value in (mine, its))
    same = one if type(one) is type(other) in (int, float) and one == other else None
    ways = [value.ways if isinstance(value, SizeOfInput) else frozenset() for value in (mine, its)]
    broken = {value.broken for value in (mine, its) if isinstance(value, SizeOfInput)}
    if len(broken) > 1 or (same is None and not ways[0] & ways[1]):
        return _UNLIKE
    return SizeOfInput(ways[0] & ways[1], same, *broken)


def _met(mine: Any, its: Any) -> Any:
    """What two records of one result, or structure of results, say together; :data:`_UNLIKE` if nothing.

    Of a batch of one column [B, 1] may be k = 1 ids of B tokens, and of one token places are always 0; what isn't them
    in another batch is computed again. So is a number in Python, of which some records don't show where it comes from.
    """
    for one, other in ((mine, its), (its, mine)):
        if isinstance(one, Replayed) and one.number and (type(other) is int or isinstance(other, SizeOfInput)):
            return one
        same = isinstance(other, Always) and isinstance(other.value, Constant)
        if isinstance(one, Replayed) and (same or (isinstance(other, Result) and other.value != "output")):
            return one
    if isinstance(mine, SizeOfInput) or isinstance(its, SizeOfInput):
        return _sized(mine, its)
    if type(mine) is not type(its):
        return _UNLIKE
    if isinstance(mine, Always):
        value = _met(mine.value, its.value)
        return value if value is _UNLIKE else Always(value)
    if isinstance(mine, Structure):
        alike = (mine.kind, mine.keys, len(mine.items)) == (its.kind, its.keys, len(its.items))
        items = tuple(map(_met, mine.items, its.items)) if alike else (_UNLIKE,)
        return _UNLIKE if _UNLIKE in items else replace(mine, items=items)
    if isinstance(mine, (Result, Constant, ShapeOfInput)):
        both = {name: getattr(mine, name) & getattr(its, name) for name in ("dtypes", "leads") if hasattr(mine, name)}
        return (
            replace(mine, **both) if all(both.values()) and replace(mine, **both) == replace(its, **both) else _UNLIKE
        )
    return mine if mine == its else _UNLIKE
