"""From a formula to a router: how the weight that meets an expert's output came about.

Everything between the router's linear map and that weight must find its place; what is left over is the reason why not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.by_choice import ByChoice
from moe_surgery.read.parse.divisor import sum_of
from moe_surgery.read.parse.logits import parse_logits
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.parse.rounding import Rounding
from moe_surgery.read.parse.top_k import Ranking, Rankings
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Groups, Precision, Ranks, Scoring
from moe_surgery.weights.layout import Piece

_SCORINGS = ("softmax", "sigmoid")
SCORED = (*_SCORINGS, "sqrt", "chosen", "elem", "div", "given")


@dataclass(frozen=True)
class RouterRead:
    """How the routing weights come about, up to their precision. ``choice`` numbers the top-k that chooses experts.

    ``above_zero`` says that this holds only if no correction bias is below zero.
    """

    piece: Piece
    num_experts: int
    top_k: int
    scoring: Scoring
    renormalize: bool
    scale: float
    choice: int = 0
    bias: Piece | None = None
    soft_cap: float | None = None
    correction: Piece | None = None
    groups: Groups | None = None
    epsilon: float = 0.0
    floor: float = 0.0
    norm: float = 1.0
    ranks: Ranks = "scores"
    above_zero: bool = False


OWN = RouterRead(Piece(""), 0, 0, "own", renormalize=False, scale=1.0)
"""A router that gives weights, however it finds them."""
ALONE = replace(OWN, renormalize=True)
"""A router of its own that gives a token's only expert no weight, which is that of a top-1 renormalised."""


@dataclass(frozen=True)
class Precisions:
    """What the fields ``…_dtype`` of a :class:`~moe_surgery.spec.RouterSpec` say."""

    logits: Precision = "native"
    cap: Precision = "float32"
    scores: Precision = "float32"
    ranked: Precision = "float32"
    weights: Precision = "float32"


@dataclass(frozen=True)
class Weight:
    """The weight of slot ``slot`` of a token's choice."""

    read: RouterRead
    precisions: Precisions
    slot: int


@dataclass(frozen=True)
class _Scored:
    """Scores in ``dtype`` of ``logits``, which are ``rounded`` on the way to them."""

    scoring: Scoring
    logits: Term
    dtype: Precision
    rounded: bool


@dataclass(frozen=True)
class _Found:
    """A router before its weights are renormalised; ``summed`` if they sum to one already."""

    read: RouterRead
    precisions: Precisions
    summed: bool


def _least(read: RouterRead) -> float:
    """What the chosen scores of a token add up to at least, whatever they are, with room for rounding."""
    best = read.scoring == "softmax" and read.groups is None and read.correction is None
    return read.top_k / read.num_experts / 2 if best else 0.0


class RouterParser:
    """Parses routing weights of the token whose input row is ``x``, in a record made at dtype ``native``."""

    def __init__(self, x: Term, native: str, terms: Terms, rankings: Sequence[Ranking]) -> None:
        self.x, self.native, self.terms = x, native, terms
        self.rounding = Rounding(native, terms)
        self.bare = self.rounding.bare
        self._rankings = Rankings(rankings, terms, self.bare)
        self.by_choice = ByChoice(self._rankings.whole, terms, self.bare)

    def parse(self, factor: Term, scale: float) -> Weight:
        """The weight ``factor`` times ``scale``."""
        vector, slot = self._slot(self.bare(factor))
        if vector.op == "given":
            return Weight(replace(OWN, scale=scale), Precisions(), slot)
        read, precisions = self._router(vector, scale)
        return Weight(read, replace(precisions, weights=self.rounding.of(factor)), slot)

    def without(self, first: bool = False) -> Weight | None:
        """The weight of 1 that the only expert has which a token was sent to, if the code gives it none.

        It is that of a top-1 that is renormalised. None if the token met more than one top-k, or one of more, unless
        it is the ``first`` that counts.
        """
        ranking = self._rankings.only
        if ranking is None or (ranking.count > 1 and not first):
            return None
        scores = ranking.scores if self._scoring(ranking.scores) else self.terms.fn("softmax", ranking.scores)
        read, precisions = self._router(self.terms.chosen(scores, ranking.scores, ranking.number, 1), 1.0)
        return Weight(replace(read, renormalize=True), precisions, 0)

    def _slot(self, term: Term) -> tuple[Term, int]:
        """A scalar as an element of a vector: ``sigmoid(v[j])`` is ``sigmoid(v)[j]``."""
        if term.op == "elem":
            return term.args[0], term.args[1]
        inner = self.terms.inner(term)
        if term.op == "div" and inner[1].size == 1:
            vector, slot = self._slot(inner[0])
            return (self.terms.div(vector, inner[1]), slot) if vector.size > 1 else (term, 0)
        if term.op in ("sigmoid", "cast", "sqrt", "softplus") and len(inner) == 1:
            vector, slot = self._slot(inner[0])
            made = self.terms.cast(vector, term.args[1]) if term.op == "cast" else self.terms.fn(term.op, vector)
            return made, slot
        if term.op == "mul":
            varying = [arg for arg in term.args if arg.op != "const"]
            if len(varying) == 1:
                vector, slot = self._slot(varying[0])
                return self.terms.mul(vector, *(arg for arg in term.args if arg.op == "const")), slot
        return term, 0

    def _router(self, vector: Term, scale: float) -> tuple[RouterRead, Precisions]:
        renormalize, epsilon, floor, norm, inside = False, 0.0, 0.0, 1.0, 1.0
        while True:  # from the outside in
            vector = self.bare(vector)
            if vector.op == "mul":
                constants = [arg.args[0] for arg in vector.args if arg.op == "const"]
                rest = [arg for arg in vector.args if arg.op != "const"]
                if len(rest) != 1:
                    raise Unreadable(f"routing weights are multiplied by {short(rest[0])}")
                for constant in constants:
                    scale, inside = (scale, inside * constant) if renormalize else (scale * constant, inside)
                vector = rest[0]
            elif vector.op == "div":
                over, constant = self._scaled(*vector.args)
                divisor = sum_of(over, vector.args[1], self.terms, self.bare, self._rankings.outside)
                scale = scale if renormalize else scale * constant
                if renormalize and (epsilon or floor):
                    raise Unreadable("routing weights are divided twice")
                if not renormalize:  # what is divided by its plain sum may have been divided before
                    epsilon, floor, norm = divisor
                renormalize, vector = True, over
            else:
                break
        if inside != 1.0 and (epsilon or floor):
            raise Unreadable(f"routing weights are multiplied by {inside:g} before they are renormalised")
        found = self._scores(vector)
        if found.summed and (epsilon or floor > 1.0 or norm != 1.0):
            raise Unreadable("routing weights that sum to one are divided by their sum plus a constant")
        floor = 0.0 if found.summed or (norm == 1.0 and floor < _least(found.read)) else floor
        read = replace(
            found.read,
            renormalize=renormalize or found.summed,
            scale=scale,
            epsilon=epsilon,
            floor=floor,
            norm=norm,
        )
        return read, found.precisions

    def _scaled(self, over: Term, under: Term) -> tuple[Term, float]:
        """What is divided without constant factors that its divisor doesn't have, and these."""
        bare = self.bare(over)
        constants = [arg.args[0] for arg in bare.args if arg.op == "const"] if bare.op == "mul" else []
        if not constants or any(inner is bare for inner in self._within(under)):
            return over, 1.0
        return self.terms.mul(*(arg for arg in bare.args if arg.op != "const")), math.prod(constants)

    def _within(self, term: Term) -> Iterator[Term]:
        """A divisor and what it is made of."""
        yield self.bare(term)
        if self.bare(term).op in ("add", "clamp", "sum", "norm"):
            for inner in self.terms.inner(self.bare(term)):
                yield from self._within(inner)

    def _scores(self, term: Term) -> _Found:
        """The router behind chosen scores."""
        outer = self._scoring(term)
        if outer is not None and self.bare(outer.logits).op == "chosen":
            taken = self.bare(outer.logits)
            values, ranked, number = taken.args
            if self.bare(values) is not self.bare(ranked):
                raise Unreadable("routing weights come from other scores than the experts are ranked by")
            self._rankings.account(number, None)
            # A softmax over the chosen logits is the softmax over all, renormalised; the others keep the order.
            summed = outer.scoring == "softmax"
            rounded = self.rounding.lost(outer.logits) or self.rounding.lost(values)
            return self._ranked(
                _Scored(outer.scoring, values, outer.dtype, rounded), ranked, number, taken.size, summed
            )
        if term.op != "chosen":
            raise Unreadable(f"routing weights are {short(term)}, not chosen scores")
        values, ranked, number = term.args
        same = self.bare(values) is self.bare(ranked)
        ranked = self._spelled_out(ranked)
        whole, groups = ranked, None
        if self.bare(ranked).op == "vec":
            base, groups = self._rankings.ungrouped(self.bare(ranked), number)
            if same:  # what is chosen lies inside of the groups
                values = base
            ranked = base
        scored = self._scoring(values)
        if scored is None:
            raise Unreadable(
                f"experts are scored by {short(self.bare(values))}, not by softmax, sigmoid or sqrt(softplus)"
            )
        if self.bare(scored.logits) is self.bare(ranked):
            if groups is not None:
                raise Unreadable("its groups rank logits, not scores")
            self._rankings.account(number, None)
            return self._ranked(scored, ranked, number, term.size, False)
        correction = self._correction(self.bare(values), ranked)
        above = groups is not None and groups.outside == 0.0 and correction is not None
        if groups is not None and groups.outside != -math.inf and correction is not None:
            if not above:
                raise Unreadable(f"experts outside its groups rank as {groups.outside:g}, scores may be lower")
            groups = replace(groups, outside=-math.inf)
        self._rankings.account(number, groups)
        if self.rounding.lost(ranked) and self.rounding.of(whole) != "native":
            raise Unreadable("its scores are rounded before they are ranked in float32")
        found = self._ranked(scored, None, number, term.size, False)
        read = replace(found.read, correction=correction, groups=groups, ranks="scores", above_zero=above)
        return _Found(read, replace(found.precisions, ranked=self.rounding.of(whole)), False)

    def _spelled_out(self, ranked: Term) -> Term:
        """Scores of which some groups are numbers, element by element."""
        bare = self.bare(ranked)
        if bare.op != "cat":
            return ranked
        return self.terms.vec([self.terms.elem(bare, place) for place in range(bare.size)])

    def _scoring(self, term: Term) -> _Scored | None:
        term = self.bare(term)
        dtype, inner, scoring = self.rounding.of(term), term, cast(Scoring, term.op)
        if term.op == "sqrt" and self.bare(term.args[0]).op == "softplus":
            inner, scoring = self.bare(term.args[0]), "sqrtsoftplus"
        elif term.op not in _SCORINGS:
            return None
        return _Scored(scoring, inner.args[0], dtype, self.rounding.lost(inner.args[0]))

    def _correction(self, values: Term, ranked: Term) -> Piece | None:
        """What is added to the scores ``values`` before they are ranked."""
        ranked = self.bare(ranked)
        if ranked is values:
            return None
        parts = [self.bare(part) for part in ranked.args] if ranked.op == "add" else []
        if len(parts) == 2 and values in parts:
            mine = parts.index(values)
            if parts[1 - mine].op == "param":
                if self.rounding.lost(ranked.args[mine]):
                    raise Unreadable("its scores are rounded before its correction bias is added")
                return cast(Piece, parts[1 - mine].args[0])
        raise Unreadable("routing weights come from other scores than the experts are ranked by")

    def _ranked(self, scored: _Scored, ranked: Term | None, number: int, top_k: int, summed: bool) -> _Found:
        """A router whose logits are ``ranked``, or whose scores are, with how its logits are rounded on either way."""
        logits = parse_logits(self.bare(scored.logits), self.x, self.rounding)
        rounded = scored.rounded if ranked is None else self.rounding.lost(ranked)
        kept = "native" if ranked is None else self.rounding.of(ranked)
        dtype = logits.dtype
        if logits.soft_cap is None and scored.rounded and rounded:  # wherever they go, they are rounded
            dtype = "native"
        elif (scored.rounded and scored.dtype != "native") or (rounded and kept != "native"):
            raise Unreadable("its logits are rounded on the way to its scores or its ranking, and not on both")
        read = RouterRead(
            logits.piece, logits.count, top_k, scored.scoring, False, 1.0, number, logits.bias, logits.soft_cap
        )
        if ranked is not None:
            read = replace(read, ranks="logits")
        precisions = Precisions(dtype, logits.cap_dtype, scored.dtype, kept)
        return _Found(read, precisions, summed)
