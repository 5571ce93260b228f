"""From formulas to meaning: one token's output as routed experts plus a shared expert, or the reason why not.

Every factor of every summand must find its place. What is left over is named in the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from moe_surgery.find.result import Unreadable
from moe_surgery.find.terms import Term
from moe_surgery.spec import Activation, Precision, Scoring
from moe_surgery.weights.layout import MLPPieces, Piece

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_SCORINGS = ("softmax", "sigmoid")
_WEIGHTS = (*_SCORINGS, "chosen", "elem", "div")
_LONGEST = 120


@dataclass(frozen=True)
class MLPRead:
    """A gated MLP: its matrices, width and activation."""

    pieces: MLPPieces
    width: int
    activation: Activation


@dataclass(frozen=True)
class RouterRead:
    """How the routing weights come about, up to their precision."""

    piece: Piece
    num_experts: int
    top_k: int
    scoring: Scoring
    renormalize: bool
    scale: float


@dataclass(frozen=True)
class SharedRead:
    """The shared expert, with the matrix of its sigmoid gate if it has one."""

    mlp: MLPRead
    gate: Piece | None
    scale: float


@dataclass(frozen=True)
class TokenRead:
    """What one token's output is. ``slots[j]`` is the expert met with the j-th routing weight."""

    router: RouterRead
    logits_dtype: Precision
    weights_dtype: Precision
    slots: tuple[MLPRead, ...]
    shared: SharedRead | None


@dataclass(frozen=True)
class _Weight:
    read: RouterRead
    logits_dtype: Precision
    weights_dtype: Precision
    slot: int


class TokenParser:
    """Parses the output term of one token, whose input row is ``x``, in a record made at dtype ``native``."""

    def __init__(self, x: Term, native: str) -> None:
        self.x, self.native = x, native
        self._routing: dict[int, bool] = {}

    def parse(self, output: Term) -> TokenRead:
        slots: dict[int, MLPRead] = {}
        weights: set[_Weight] = set()
        shared: list[SharedRead] = []
        for factors in self._products(output):
            routing = [factor for factor in factors if self._routed(factor)]
            if not routing:
                shared.append(self._shared(factors))
                continue
            weight, mlp = self._expert(routing, [factor for factor in factors if factor not in routing])
            if weight.slot in slots:
                raise Unreadable(f"routing weight {weight.slot} is used more than once")
            slots[weight.slot] = mlp
            weights.add(_Weight(weight.read, weight.logits_dtype, weight.weights_dtype, 0))
        if not slots:
            raise Unreadable("no routed experts (weights of a top-k times an MLP) in its output")
        if len(shared) > 1:
            raise Unreadable("it adds a second shared expert")
        if len(weights) != 1:
            raise Unreadable("its experts are weighted in different ways")
        weight = weights.pop()
        if sorted(slots) != list(range(weight.read.top_k)):
            raise Unreadable(f"it uses {len(slots)} of its top-{weight.read.top_k} routing weights")
        order = tuple(slots[slot] for slot in range(len(slots)))
        return TokenRead(weight.read, weight.logits_dtype, weight.weights_dtype, order, shared[0] if shared else None)

    def bare(self, term: Term) -> Term:
        """The term without changes of precision between the input's dtype and float32."""
        while term.op == "cast":
            if term.args[1] not in (self.native, "float32"):
                raise Unreadable(f"it computes in {term.args[1]} on the way")
            term = term.args[0]
        return term

    def _routed(self, term: Term) -> bool:
        """Whether a term depends on the chosen scores."""
        known = self._routing.get(term.uid)
        if known is None:
            known = term.op == "chosen" or any(self._routed(arg) for arg in term.args if isinstance(arg, Term))
            self._routing[term.uid] = known
        return known

    def _products(self, term: Term) -> Iterator[list[Term]]:
        """The summands of a term as lists of factors, products of sums multiplied out."""
        term = self.bare(term)
        if term.op == "add":
            for arg in term.args:
                yield from self._products(arg)
        elif term.op == "mul":
            sums = [arg for arg in term.args if self.bare(arg).op in ("add", "mul") and arg.size > 1]
            if len(sums) != 1:
                yield list(term.args)
                return
            others = [arg for arg in term.args if arg is not sums[0]]
            for factors in self._products(sums[0]):
                yield [*others, *factors]
        elif not (term.op == "const" and term.args[0] == 0.0):
            yield [term]

    def _expert(self, routing: list[Term], others: list[Term]) -> tuple[_Weight, MLPRead]:
        if any(self.bare(factor).op == "lin" for factor in routing):
            raise Unreadable("routing weights meet the input of a linear map, not the experts' output")
        through = [factor for factor in routing if factor.size > 1]
        if through:
            raise Unreadable(f"its experts' output goes through {_short(through[0])}")
        if len(routing) > 1:
            strange = [factor for factor in routing if self.bare(factor).op not in _WEIGHTS] or routing
            raise Unreadable(f"a routed expert's output is multiplied by {_short(strange[-1])}")
        scale, others = self._constants(others)
        maps = [factor for factor in others if self.bare(factor).op == "lin"]
        if not maps:
            raise Unreadable(f"it adds {_product(others, scale)} times a routing weight")
        extra = [factor for factor in others if factor not in maps]
        if extra or len(maps) > 1:
            raise Unreadable(f"a routed expert's output is multiplied by {_short([*extra, *maps][0])}")
        return self._weight(routing[0], scale), self._mlp(maps[0], "a routed expert")

    def _constants(self, factors: list[Term]) -> tuple[float, list[Term]]:
        scale = 1.0
        for factor in factors:
            if factor.op == "const":
                scale *= factor.args[0]
        return scale, [factor for factor in factors if factor.op != "const"]

    def _weight(self, factor: Term, scale: float) -> _Weight:
        weights_dtype: Precision = "native" if factor.op == "cast" and factor.args[1] == self.native else "float32"
        vector, slot = self.bare(factor), 0
        if vector.op == "elem":
            vector, slot = vector.args
        renormalize = False
        while True:  # from the outside in; a constant inside a renormalisation cancels
            vector = self.bare(vector)
            if vector.op == "mul":
                constant, rest = self._constants(list(vector.args))
                if len(rest) != 1:
                    raise Unreadable(f"routing weights are multiplied by {_short(rest[0])}")
                scale, vector = scale if renormalize else scale * constant, rest[0]
            elif vector.op == "div":
                self._check_sum(*vector.args)
                renormalize, vector = True, vector.args[0]
            else:
                break
        scoring, logits, top_k, normalised = self._scores(vector)
        if logits.op == "lin" and self.bare(logits.args[0]).op == "x" and self.bare(logits.args[0]) is not self.x:
            raise Unreadable("a token is routed by another token's input")
        if logits.op != "lin" or self.bare(logits.args[0]) is not self.x:
            raise Unreadable(f"the router's logits are {_short(logits)}, not one linear map of its input")
        _, piece, dtype = logits.args
        read = RouterRead(piece, logits.size, top_k, scoring, renormalize or normalised, scale)
        logits_dtype: Precision = "native" if dtype == self.native else "float32"
        return _Weight(read, logits_dtype, weights_dtype, slot)

    def _check_sum(self, over: Term, under: Term) -> None:
        under = self.bare(under)
        if under.op == "add" and any(arg.op == "const" for arg in under.args):
            constant = next(arg for arg in under.args if arg.op == "const")
            raise Unreadable(f"routing weights are divided by their sum plus {constant.args[0]:g}")
        whole = under.args[0] if under.op == "sum" else under
        if self.bare(whole) is not self.bare(over) or (under.op != "sum" and over.size != 1):
            raise Unreadable(f"routing weights are divided by {_short(under)}")

    def _scores(self, term: Term) -> tuple[Scoring, Term, int, bool]:
        """``(scoring, logits, k, whether the scoring already sums to one)`` of the chosen scores."""
        if term.op in _SCORINGS and self.bare(term.args[0]).op == "chosen":
            values, ranked = self.bare(term.args[0]).args
            if self.bare(values) is not self.bare(ranked):
                raise Unreadable("routing weights come from other scores than the experts are ranked by")
            # A softmax over the chosen logits is the softmax over all, renormalised; a sigmoid keeps the order.
            return cast(Scoring, term.op), self.bare(values), term.size, term.op == "softmax"
        if term.op != "chosen":
            raise Unreadable(f"routing weights are {_short(term)}, not chosen scores")
        values, ranked = (self.bare(arg) for arg in term.args)
        if values is not ranked:
            if values.op in _SCORINGS and self.bare(values.args[0]) is ranked:
                return cast(Scoring, values.op), ranked, term.size, False
            raise Unreadable("routing weights come from other scores than the experts are ranked by")
        if values.op not in _SCORINGS:
            raise Unreadable(f"experts are scored by {_short(values)}, not by softmax or sigmoid")
        return cast(Scoring, values.op), self.bare(values.args[0]), term.size, False

    def _mlp(self, term: Term, whose: str) -> MLPRead:
        term = self.bare(term)
        inner, down, _ = term.args
        hidden = self.bare(inner)
        parts = [self.bare(arg) for arg in hidden.args] if hidden.op == "mul" else [hidden]
        active = [part for part in parts if part.op not in ("lin", "const")]
        plain = [part for part in parts if part.op == "lin"]
        others = [part for part in parts if part.op not in ACTIVATIONS]
        if len(parts) == 2 and len(others) == 1 and others[0].op == "add":
            raise Unreadable(f"{whose}'s up projection is {_short(others[0])}, not one linear map")
        if len(parts) != 2 or len(active) != 1 or len(plain) != 1:
            raise Unreadable(f"{whose} is not down(act(gate(x)) * up(x)): between its maps stands {_short(hidden)}")
        if active[0].op not in ACTIVATIONS:
            raise Unreadable(f"{whose}'s activation is {_short(active[0])}, none of {', '.join(ACTIVATIONS)}")
        gate, up = self.bare(active[0].args[0]), plain[0]
        for name, linear in (("gate", gate), ("up", up)):
            if linear.op != "lin":
                raise Unreadable(f"{whose}'s {name} projection is {_short(linear)}, not one linear map")
            if self.bare(linear.args[0]) is not self.x:
                raise Unreadable(f"{whose}'s input is {_short(linear.args[0])}, not the block's input")
        if gate.size != up.size:
            raise Unreadable(f"{whose}'s gate and up projections have widths {gate.size} and {up.size}")
        return MLPRead(MLPPieces(gate.args[1], up.args[1], down), gate.size, cast(Activation, active[0].op))

    def _shared(self, factors: list[Term]) -> SharedRead:
        scale, factors = self._constants(factors)
        maps = [factor for factor in factors if self.bare(factor).op == "lin" and factor.size > 1]
        others = [factor for factor in factors if factor not in maps]
        if not maps:
            raise Unreadable(f"it adds {_product(factors, scale)} to its experts' output")
        if len(maps) > 1:
            raise Unreadable("it multiplies two MLPs")
        gate = None
        for factor in others:
            value = self.bare(factor)
            inner = self.bare(value.args[0]) if value.op == "sigmoid" else value
            if gate is not None or value.op != "sigmoid" or inner.op != "lin" or inner.size != 1:
                raise Unreadable(f"the shared expert is multiplied by {_short(value)}")
            if self.bare(inner.args[0]) is not self.x:
                raise Unreadable(f"the shared expert's gate reads {_short(inner.args[0])}, not the block's input")
            gate = inner.args[1]
        return SharedRead(self._mlp(maps[0], "the shared expert"), gate, scale)


def _product(factors: list[Term], scale: float) -> str:
    return " * ".join(map(_short, factors)) if factors else f"{scale:g}"


def _short(term: Term) -> str:
    text = repr(term)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
