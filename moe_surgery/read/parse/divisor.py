"""What routing weights are divided by: their sum, or another norm of them, with what keeps it from zero."""

from __future__ import annotations

from collections.abc import Callable

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.reading import Unreadable


def sum_of(
    over: Term, under: Term, terms: Terms, bare: Callable[[Term], Term], masked: bool
) -> tuple[float, float, float]:
    """``(epsilon, floor, norm)`` of a division of weights ``over`` by their norm; ``bare`` takes rounding off a term.

    Raises :class:`~moe_surgery.read.reading.Unreadable` for another divisor; ``masked`` scores may have been chosen.
    """
    under, epsilon, floor = bare(under), 0.0, 0.0
    if under.op == "clamp" and under.args[2] == float("inf"):
        floor, under = under.args[1], bare(under.args[0])
    if under.op == "add" and any(arg.op == "const" for arg in under.args):
        epsilon = next(arg.args[0] for arg in under.args if arg.op == "const")
        under = bare(terms.add(*(arg for arg in under.args if arg.op != "const")))
    norm = under.args[1] if under.op == "norm" else 1.0
    # Every scoring that is known gives weights above zero, so that the sum is the 1-norm.
    whole = under.args[0] if under.op in ("sum", "norm") else under
    same = bare(whole) is bare(over) and (under.op in ("sum", "norm") or over.size == 1)
    if not same and not _adds_up(under, bare(over), terms, bare):
        if masked:
            raise Unreadable("routing weights are divided by masked scores that aren't those that its top-k gives")
        raise Unreadable(f"routing weights are divided by {short(under)}")
    if epsilon < 0 or floor < 0:
        raise Unreadable("routing weights are divided by their sum less a constant")
    return epsilon, floor, norm


def _adds_up(under: Term, over: Term, terms: Terms, bare: Callable[[Term], Term]) -> bool:
    """Whether a divisor is the sum of all elements of a vector, one by one, each rounded as it may be."""
    if under.op != "add" or len(under.args) != over.size:
        return False
    elements = [bare(terms.elem(over, place)) for place in range(over.size)]
    return {bare(arg).uid for arg in under.args} == {element.uid for element in elements}
