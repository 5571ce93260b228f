"""From a formula to an MLP: its matrices and biases, and what stands between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Activation, Mix
from moe_surgery.weights.layout import MLPPieces, Piece

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "mish": "mish",
    "hardswish": "hardswish",
    "tanh": "tanh",
    "elu": "elu",
    "elu 1": "elu",
    "leaky_relu": "leaky_relu",
    "leaky_relu 0.01": "leaky_relu",
    "relu6": "relu6",
    "hardtanh 0 6": "relu6",
}
"""Functions by the names that operations have, and what a spec calls them."""
_LONGEST = 120


@dataclass(frozen=True)
class MLPRead:
    """An MLP: its pieces, width, and what stands between its matrices.

    ``identity`` is one that returns its input, and ``residual`` one that adds its input to what it makes.
    """

    pieces: MLPPieces
    width: int
    mix: Mix
    identity: bool = False
    residual: bool = False


IDENTITY = MLPRead(MLPPieces(Piece(""), Piece(""), Piece("")), 0, Mix("relu"), identity=True)


@dataclass(frozen=True)
class _Half:
    """One side of the product: a projection, clamped to ``low`` and ``high``, plus ``offset``."""

    matrix: Piece
    bias: Piece | None
    size: int
    low: float
    high: float
    offset: float


class MLPParser:
    """Parses MLPs of the token whose input row is ``x``, in a record made at dtype ``native``."""

    def __init__(self, x: Term, native: str) -> None:
        self.x, self.native = x, native

    def bare(self, term: Term) -> Term:
        """The term without changes of precision between the input's dtype and float32."""
        while term.op == "cast":
            if term.args[1] not in (self.native, "float32"):
                raise Unreadable(f"it computes in {term.args[1]} on the way")
            term = term.args[0]
        return term

    def parse(self, term: Term, whose: str, weight: Term | None = None) -> MLPRead:
        """The MLP that ends in the linear map ``term``; its input is ``weight`` times ``x`` where one is given."""
        inner, down, _ = self.bare(term).args
        hidden = self.bare(inner)
        parts = [self.bare(arg) for arg in hidden.args] if hidden.op == "mul" else [hidden]
        gate, activation, alpha, after, rest = self._activated(parts, hidden, whose)
        half = self._half(gate, whose, "gate", weight)
        if half.low != -math.inf or half.offset:
            raise Unreadable(f"{whose}'s gate projection is {short(gate)}, not one linear map, clamped from above")
        limit, late = (half.high, False) if after is None else (after, True)
        if after is not None and half.high != math.inf:
            raise Unreadable(f"{whose} clamps its gate before and after its activation")
        mix = Mix(activation, True, None if limit == math.inf else limit, late, alpha)
        pieces = MLPPieces(half.matrix, half.matrix, down, half.bias)
        if not rest:
            if mix.limit is not None:
                raise Unreadable(f"{whose} has no up projection and clamps")
            return MLPRead(pieces, half.size, replace(mix, gated=False))
        up = self._half(rest[0], whose, "up", None)
        if up.size != half.size:
            raise Unreadable(f"{whose}'s gate and up projections have widths {half.size} and {up.size}")
        if (up.low, up.high) != (-limit, limit):
            raise Unreadable(f"{whose} clamps its gate at {limit:g} and its up projection to {up.low:g}…{up.high:g}")
        return MLPRead(replace(pieces, up=up.matrix, up_bias=up.bias), half.size, replace(mix, offset=up.offset))

    def _activated(
        self, parts: list[Term], hidden: Term, whose: str
    ) -> tuple[Term, Activation, float, float | None, list[Term]]:
        """``(gate, activation, alpha, clamp after it, the other factors)`` of the product between the matrices."""
        for part in parts:
            rest = _without(parts, part)
            if part.op == "tanh" and (inner := self.bare(part.args[0])).op == "softplus" and inner.args[0] in rest:
                rest.remove(inner.args[0])
                return self.bare(inner.args[0]), "mish", 1.0, None, self._one(rest, hidden, whose)
            if part.op == "clamp" and self.bare(part.args[0]).op in ACTIVATIONS and part.args[1] == -math.inf:
                inside = self.bare(part.args[0])
                return (*self._named(inside), part.args[2], self._one(rest, hidden, whose))
            if part.op in ACTIVATIONS or part.op in ("square", "pow 2"):
                twice = part in rest and part.op == "relu"
                if twice:
                    rest.remove(part)
                gate, activation, alpha = self._named(part)
                return gate, activation if not twice else "relu2", alpha, None, self._one(rest, hidden, whose)
            if part.op == "sigmoid":
                inner = self.bare(part.args[0])
                factors = list(inner.args) if inner.op == "mul" else [inner]
                scale = [factor.args[0] for factor in factors if factor.op == "const"]
                gates = [self.bare(factor) for factor in factors if factor.op != "const"]
                if len(gates) == 1 and gates[0] in rest:
                    rest.remove(gates[0])
                    return gates[0], "silu", math.prod(scale), None, self._one(rest, hidden, whose)
        for part in parts:
            if part.op == "sigmoid":
                return self.bare(part.args[0]), "sigmoid", 1.0, None, self._one(_without(parts, part), hidden, whose)
        raise Unreadable(f"{whose} is not down(act(gate(x)) * up(x)): between its maps stands {short(hidden)}")

    def _named(self, part: Term) -> tuple[Term, Activation, float]:
        if part.op in ("square", "pow 2"):
            inner = self.bare(part.args[0])
            if inner.op != "relu":
                raise Unreadable(f"between a routed expert's maps stands {short(part)}")
            return self.bare(inner.args[0]), "relu2", 1.0
        if part.op in ACTIVATIONS:
            return self.bare(part.args[0]), ACTIVATIONS[part.op], 1.0
        raise Unreadable(f"the activation {short(part)} is none of {', '.join(get_args(Activation))}")

    def _one(self, rest: list[Term], hidden: Term, whose: str) -> list[Term]:
        if len(rest) > 1:
            raise Unreadable(f"{whose} is not down(act(gate(x)) * up(x)): between its maps stands {short(hidden)}")
        return rest

    def _half(self, term: Term, whose: str, name: str, weight: Term | None) -> _Half:
        start, offset, low, high = term, 0.0, -math.inf, math.inf
        term = self.bare(term)
        bias = None
        if term.op == "add" and any(arg.op == "const" for arg in term.args):
            offset = sum(arg.args[0] for arg in term.args if arg.op == "const")
            others = [arg for arg in term.args if arg.op != "const"]
            term = self.bare(others[0]) if len(others) == 1 else term
        if term.op == "clamp":
            term, low, high = self.bare(term.args[0]), term.args[1], term.args[2]
        if term.op == "add" and len(term.args) == 2:
            parts = sorted(map(self.bare, term.args), key=lambda part: part.op == "param")
            if parts[1].op == "param":
                term, bias = parts[0], parts[1].args[0]
        if weight is not None:
            factors = [self.bare(arg) for arg in term.args] if term.op == "mul" else []
            if len(factors) != 2 or weight not in factors:
                raise Unreadable(f"routing weights meet {short(term)}, not the input of both projections")
            factors.remove(weight)
            term = factors[0]
        if term.op != "lin":
            raise Unreadable(f"{whose}'s {name} projection is {short(start)}, not one linear map")
        if self.bare(term.args[0]) is not self.x:
            raise Unreadable(f"{whose}'s input is {short(term.args[0])}, not the block's input")
        return _Half(term.args[1], bias, term.size, low, high, offset)


def _without(parts: list[Term], part: Term) -> list[Term]:
    """All factors but one that is ``part``; there may be more than one."""
    place = parts.index(part)
    return parts[:place] + parts[place + 1 :]


def short(term: Term) -> str:
    text = repr(term)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
