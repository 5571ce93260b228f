"""From a formula to a router's logits: one linear map of the token, its bias, and a soft cap."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.parse.rounding import Rounding
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Precision
from moe_surgery.weights.layout import Piece


@dataclass(frozen=True)
class Logits:
    """The matrix of ``count`` logits, with what they and their soft cap are kept in."""

    piece: Piece
    count: int
    bias: Piece | None
    soft_cap: float | None
    dtype: Precision
    cap_dtype: Precision


def parse_logits(term: Term, x: Term, rounding: Rounding) -> Logits:
    """The logits of the token whose input row is ``x``, from a term that isn't rounded at its end."""
    cap, cap_dtype, linear = None, rounding.of(term), term
    capping = term.op == "mul" and any(rounding.bare(arg).op == "tanh" for arg in term.args)
    if capping:
        cap, linear = _capped(term, rounding)
    bias, lost = None, rounding.lost(linear)
    linear = rounding.bare(linear)
    if linear.op == "add" and len(linear.args) == 2:
        product, added = sorted(linear.args, key=lambda part: rounding.bare(part).op == "param")
        if rounding.bare(added).op == "param":
            if rounding.of(linear) != rounding.of(rounding.bare(product)):
                raise Unreadable("its router's bias is added in another dtype than its linear map is computed in")
            linear, bias = rounding.bare(product), rounding.bare(added).args[0]
    source = rounding.bare(linear.args[0]) if linear.op == "lin" else None
    if source is not None and source.op == "x" and source is not x:
        raise Unreadable("a token is routed by another token's input")
    if source is not x:
        raise Unreadable(f"the router's logits are {short(term)}, not one linear map of its input")
    dtype: Precision = "native" if lost else rounding.of(linear)
    return Logits(linear.args[1], linear.size, bias, cap, dtype, cap_dtype if capping else "float32")


def _capped(term: Term, rounding: Rounding) -> tuple[float, Term]:
    """The cap of ``c * tanh(logits / c)``, and the logits."""
    cap = [arg.args[0] for arg in term.args if arg.op == "const"]
    curve = next(arg for arg in term.args if rounding.bare(arg).op == "tanh")
    inside = rounding.bare(curve).args[0]
    quotient = rounding.bare(inside)
    factors = list(quotient.args) if quotient.op == "mul" else []
    inverse = [arg.args[0] for arg in factors if arg.op == "const"]
    rest = [arg for arg in factors if arg.op != "const"]
    alike = len(cap) == len(inverse) == len(rest) == 1 and len(term.args) == 2
    if not alike or cap[0] <= 0 or abs(cap[0] * inverse[0] - 1) > 1e-12:
        raise Unreadable(f"the router's logits are {short(term)}, not one linear map of its input")
    if len({rounding.of(term), rounding.of(rounding.bare(curve)), rounding.of(quotient)}) > 1:
        raise Unreadable("its soft cap is computed in several dtypes")
    return cap[0], rest[0]
