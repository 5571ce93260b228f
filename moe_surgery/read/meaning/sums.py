"""Sums whose summands together are one thing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_surgery.read.meaning.term import Term
from moe_surgery.read.meaning.wholes import extended

if TYPE_CHECKING:
    from moe_surgery.read.meaning.normal_form import Terms


def summed(terms: Terms, summands: list[Term]) -> list[Term]:
    """All that were chosen, each once, are their sum."""
    for vector in {term.args[0] for term in summands if term.op == "elem" and term.args[0].op == "chosen"}:
        mine = [term for term in summands if term.op == "elem" and term.args[0] is vector]
        if sorted(term.args[1] for term in mine) == list(range(vector.size)):
            summands = [term for term in summands if term not in mine] + [terms.total(vector)]
    return summands


def cancelled(terms: Terms, summands: list[Term]) -> list[Term]:
    """Without what is added and taken away again, as code does that hands gradients past a sum of its own."""
    for negative in [term for term in summands if term.op == "mul" and any(map(_below_zero, term.args))]:
        taken = terms.mul(negative, terms.const(-1.0))
        parts = Counter(taken.args if taken.op == "add" else (taken,))
        if parts <= Counter(summands):
            summands = list((Counter(summands) - parts - Counter([negative])).elements())
    return summands


def _below_zero(term: Term) -> bool:
    return bool(term.op == "const" and term.args[0] < 0.0)


def joined(terms: Terms, summands: list[Term]) -> list[Term]:
    """Maps of the parts of one vector by the columns of one matrix are the map of that vector."""
    by_matrix: dict[Any, list[Term]] = {}
    for term in summands:
        whole = replace(term.args[1], cols=None) if term.op == "lin" and term.args[1].cols else None
        by_matrix.setdefault((whole, term.size, term.args[2]) if whole else term, []).append(term)
    found = []
    for key, parts in by_matrix.items():
        if isinstance(key, Term):
            found += parts
            continue
        parts.sort(key=lambda term: term.args[1].cols)
        cuts = [term.args[1].cols for term in parts]
        vector = _end_to_end(terms, [term.args[0] for term in parts])
        starts = [0, *(stop for _, stop, _ in cuts)]
        complete = [start for start, _, _ in cuts] == starts[:-1] and starts[-1] == cuts[0][2]
        if vector is None or not complete or vector.size != cuts[0][2]:
            found += parts
        else:
            found.append(terms.lin(vector, key[0], key[1], key[2]))
    return found


def _end_to_end(terms: Terms, parts: list[Term]) -> Term | None:
    """The vector that parts of it make, one after another."""
    place, size = 0, sum(part.size for part in parts)
    found = set()
    for part in parts:
        found.add(extended(terms, part, place, size))
        place += part.size
    return found.pop() if len(found) == 1 else None
