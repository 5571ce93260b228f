"""Numbers of which a record took some to be above zero and the others to be zero: whether their formulas say so."""

from __future__ import annotations

from moe_surgery.read.meaning.interpreter import Interpreter
from moe_surgery.read.meaning.rows import scalars
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Flow

_ABOVE = frozenset(["softmax", "sigmoid", "exp", "softplus"])
_AS_ITS_OWN = frozenset(["elem", "part", "chosen", "cast", "sqrt", "sum", "largest", "norm"])
_ALL_OF_THEM = frozenset(["add", "mul", "div", "vec", "cat"])


def check_above_zero(flow: Flow, run: Interpreter) -> None:
    """Raise :class:`Unreadable` if a record took numbers for zero, or for above zero, that may be something else.

    A softmax or a sigmoid is above zero unless it underflows, and then it makes no difference whether it takes part.
    """
    known: dict[int, bool] = {}
    for ref, places in flow.positive:
        items = scalars(run.rows(ref), run.terms).lead.reshape(-1)
        for item, place in zip(items, places.reshape(-1).tolist(), strict=True):
            if not (_above_zero(item, known) if place else item.op == "const" and item.args[0] == 0.0):
                raise Unreadable("what it does depends on the values it computes (which of them are above zero)")


def _above_zero(term: Term, known: dict[int, bool]) -> bool:
    if term.uid not in known:
        known[term.uid] = _found(term, known)
    return known[term.uid]


def _found(term: Term, known: dict[int, bool]) -> bool:
    if term.op in _ABOVE:
        return True
    if term.op == "const":
        return bool(term.args[0] > 0.0)
    if term.op == "clamp":
        return bool(term.args[1] > 0.0) or (bool(term.args[2] > 0.0) and _above_zero(term.args[0], known))
    if term.op in _AS_ITS_OWN:
        return _above_zero(term.args[0], known)
    if term.op in _ALL_OF_THEM:
        return all(_above_zero(arg, known) for arg in term.args if isinstance(arg, Term))
    return False
