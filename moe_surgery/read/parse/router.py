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
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.parse.top_k import Ranking, Rankings
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Groups, Precision, Scoring
from moe_surgery.weights.layout import Piece

_SCORINGS = ("softmax", "sigmoid")
SCORED = (*_SCORINGS, "sqrt", "chosen", "elem", "div", "given")


@dataclass(frozen=True)
class RouterRead:
    """How the routing weights come about, up to their precision. ``choice`` numbers the top-k that chooses experts."""

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


@dataclass(frozen=True)
class Weight:
    """The weight of slot ``slot`` of a token's choice."""

    read: RouterRead
    logits_dtype: Precision
    weights_dtype: Precision
    slot: int


class RouterParser:
    """Parses routing weights of the token whose input row is ``x``, in a record made at dtype ``native``."""

    def __init__(self, x: Term, native: str, terms: Terms, rankings: Sequence[Ranking]) -> None:
        self.x, self.native, self.terms = x, native, terms
        self._rankings = Rankings(rankings, terms, self.bare)

    def bare(self, term: Term) -> Term:
        while term.op == "cast":
            if term.args[1] not in (self.native, "float32"):
                raise Unreadable(f"it computes in {term.args[1]} on the way")
            term = term.args[0]
        return term

    def parse(self, factor: Term, scale: float) -> Weight:
        """The weight ``factor`` times ``scale``."""
        dtype: Precision = "native" if factor.op == "cast" and factor.args[1] == self.native else "float32"
        vector, slot = self._slot(self.bare(factor))
        if vector.op == "given":
            read = RouterRead(Piece(""), 0, 0, "own", False, scale)
            return Weight(read, "native", "float32", slot)
        read, logits_dtype = self._router(vector, scale)
        return Weight(read, logits_dtype, dtype, slot)

    def _slot(self, term: Term) -> tuple[Term, int]:
        """A scalar as an element of a vector: ``sigmoid(v[j])`` is ``sigmoid(v)[j]``."""
        if term.op == "elem":
            return term.args[0], term.args[1]
        inner = self.terms.inner(term)
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

    def _router(self, vector: Term, scale: float) -> tuple[RouterRead, Precision]:
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
                divisor = self._divisor(over, vector.args[1])
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
        floor = 0.0 if found.summed else floor
        read = replace(
            found.read,
            renormalize=renormalize or found.summed,
            scale=scale,
            epsilon=epsilon,
            floor=floor,
            norm=norm,
        )
        return read, found.logits_dtype

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

    def _divisor(self, over: Term, under: Term) -> tuple[float, float, float]:
        """``(epsilon, floor, norm)`` of a division of weights by their norm."""
        under, epsilon, floor = self.bare(under), 0.0, 0.0
        if under.op == "clamp" and under.args[2] == float("inf"):
            floor, under = under.args[1], self.bare(under.args[0])
        if under.op == "add" and len(under.args) == 2 and any(arg.op == "const" for arg in under.args):
            epsilon = next(arg.args[0] for arg in under.args if arg.op == "const")
            under = self.bare(next(arg for arg in under.args if arg.op != "const"))
        norm = under.args[1] if under.op == "norm" else 1.0
        # Every scoring that is known gives weights above zero, so that the sum is the 1-norm.
        whole = under.args[0] if under.op in ("sum", "norm") else under
        if self.bare(whole) is not self.bare(over) or (under.op not in ("sum", "norm") and over.size != 1):
            raise Unreadable(f"routing weights are divided by {short(under)}")
        if epsilon < 0 or floor < 0:
            raise Unreadable("routing weights are divided by their sum less a constant")
        return epsilon, floor, norm

    @dataclass(frozen=True)
    class _Found:
        read: RouterRead
        logits_dtype: Precision
        summed: bool

    def _scores(self, term: Term) -> _Found:
        """The router behind chosen scores."""
        outer = self._scoring(term)
        if outer is not None and self.bare(outer[1]).op == "chosen":
            chosen = self.bare(outer[1])
            values, ranked, number = chosen.args
            if self.bare(values) is not self.bare(ranked):
                raise Unreadable("routing weights come from other scores than the experts are ranked by")
            # A softmax over the chosen logits is the softmax over all, renormalised; the others keep the order.
            summed = outer[0] == "softmax"
            return self._found(outer[0], self.bare(values), number, chosen.size, None, None, summed)
        if term.op != "chosen":
            raise Unreadable(f"routing weights are {short(term)}, not chosen scores")
        values, ranked, number = term.args
        values, ranked = self.bare(values), self.bare(ranked)
        groups = None
        if ranked.op == "vec":
            base, groups = self._rankings.ungrouped(ranked, number)
            if values is ranked:
                if groups is not None and groups.outside != 0.0:
                    raise Unreadable("routing weights are scores that groups made infinite")
                values = base
            ranked = base
        scored = self._scoring(values)
        if scored is None:
            raise Unreadable(f"experts are scored by {short(values)}, not by softmax, sigmoid or sqrt(softplus)")
        scoring, logits = scored
        correction = None
        if ranked is not values and self.bare(logits) is not ranked:
            correction = self._correction(values, ranked)
        if groups is not None and groups.outside != -math.inf and correction is not None:
            raise Unreadable(
                f"experts outside its groups rank as {groups.outside:g}, and its correction bias may rank others lower"
            )
        if groups is not None and self.bare(logits) is ranked:
            raise Unreadable("its groups rank logits, not scores")
        return self._found(scoring, self.bare(logits), number, term.size, correction, groups, False)

    def _scoring(self, term: Term) -> tuple[Scoring, Term] | None:
        term = self.bare(term)
        if term.op in _SCORINGS:
            return cast(Scoring, term.op), term.args[0]
        if term.op == "sqrt" and self.bare(term.args[0]).op == "softplus":
            return "sqrtsoftplus", self.bare(term.args[0]).args[0]
        return None

    def _correction(self, values: Term, ranked: Term) -> Piece:
        parts = [self.bare(part) for part in ranked.args] if ranked.op == "add" else []
        if len(parts) == 2 and values in parts:
            other = parts[1 - parts.index(values)]
            if other.op == "param":
                return cast(Piece, other.args[0])
        raise Unreadable("routing weights come from other scores than the experts are ranked by")

    def _found(
        self,
        scoring: Scoring,
        logits: Term,
        number: int,
        top_k: int,
        correction: Piece | None,
        groups: Groups | None,
        summed: bool,
    ) -> _Found:
        cap, bias, start = None, None, logits
        if logits.op == "mul" and any(self.bare(arg).op == "tanh" for arg in logits.args):
            cap, logits = self._capped(logits)
        if logits.op == "add" and len(logits.args) == 2:
            parts = sorted(map(self.bare, logits.args), key=lambda part: part.op == "param")
            if parts[1].op == "param":
                logits, bias = parts[0], parts[1].args[0]
        source = self.bare(logits.args[0]) if logits.op == "lin" else None
        if source is not None and source.op == "x" and source is not self.x:
            raise Unreadable("a token is routed by another token's input")
        if source is not self.x:
            raise Unreadable(f"the router's logits are {short(start)}, not one linear map of its input")
        _, piece, dtype = logits.args
        self._rankings.account(number, groups)
        read = RouterRead(piece, logits.size, top_k, scoring, False, 1.0, number, bias, cap, correction, groups)
        return self._Found(read, "native" if dtype == self.native else "float32", summed)

    def _capped(self, term: Term) -> tuple[float, Term]:
        cap = [arg.args[0] for arg in term.args if arg.op == "const"]
        inner = self.bare(next(self.bare(arg) for arg in term.args if self.bare(arg).op == "tanh").args[0])
        factors = list(inner.args) if inner.op == "mul" else []
        inverse = [arg.args[0] for arg in factors if arg.op == "const"]
        rest = [self.bare(arg) for arg in factors if arg.op != "const"]
        alike = len(cap) == len(inverse) == len(rest) == 1 and len(term.args) == 2
        if not alike or cap[0] <= 0 or abs(cap[0] * inverse[0] - 1) > 1e-12:
            raise Unreadable(f"the router's logits are {short(term)}, not one linear map of its input")
        return cap[0], rest[0]
