"""Vectors told from their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_surgery.read.meaning.term import WHOLE, Term

if TYPE_CHECKING:
    from moe_surgery.read.meaning.normal_form import Terms


def extended(terms: Terms, term: Term, start: int, size: int) -> Term | None:
    """The vector of ``size`` elements that ``term`` is the elements from ``start`` of, if it can be one."""
    if term.op == "const" or (term.size, start) == (size, 0):
        return term
    if term.op in ("elem", "part"):
        return extended(terms, term.args[0], start - term.args[1], size)
    if term.op in ("lin", "param"):
        piece = term.args[-2] if term.op == "lin" else term.args[0]
        complete = replace(piece, rows=None, out=None)
        if complete.outputs(start, start + term.size) != piece:
            return None
        if term.op == "param":
            return terms.param(complete, size)
        return terms.lin(term.args[0], complete, size, term.args[2])
    parts = [extended(terms, arg, start, size) for arg in terms.inner(term)]
    if not parts or term.op in WHOLE or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    return terms.rebuilt(term, known)


def among(terms: Terms, vector: Term) -> Term | None:
    """The vector of which some elements stand among numbers in one that is spelled out, each in its place."""
    found = {extended(terms, e, place, vector.size) for place, e in enumerate(vector.args) if e.op != "const"}
    return found.pop() if len(found) == 1 else None


def gathered(terms: Terms, vector: Term) -> Term:
    """A vector that is spelled out element by element, as sums and products of vectors, if it is one."""
    if vector.op != "vec":
        return vector
    first, second = vector.args[:2]
    whole = _of_first(terms, first, vector.size, set(_inside(second)))
    if whole is not None and any(
        all(_at(terms, whole, place, inner) is element for place, element in enumerate(vector.args))
        for inner in (True, False)
    ):
        return whole
    return vector


def _at(terms: Terms, term: Term, place: int, inner: bool) -> Term:
    """An element of sums and products of vectors, as the sum or product of elements; ``inner`` sums in products too."""
    if term.size == 1:
        return term
    if term.op not in ("add", "mul"):
        return terms.elem(term, place)
    ends = term.op == "mul" and not inner
    parts = [terms.elem(arg, place) if ends and arg.op == "add" else _at(terms, arg, place, inner) for arg in term.args]
    return terms.rebuilt(term, parts)


def _inside(term: Term) -> Iterator[int]:
    """A term and those that it is made of by adding and multiplying, by number."""
    yield term.uid
    if term.op in ("add", "mul"):
        for arg in term.args:
            yield from _inside(arg)


def _of_first(terms: Terms, term: Term, size: int, alike: set[int]) -> Term | None:
    """The vector that ``term`` is the first element of, where those in ``alike`` are the same for all elements."""
    if term.uid in alike:
        return term
    if term.op not in ("add", "mul"):
        return extended(terms, term, 0, size)
    parts = [_of_first(terms, arg, size, alike) for arg in term.args]
    known = [part for part in parts if part is not None]
    return terms.rebuilt(term, known) if len(known) == len(parts) else None


def neighbours(terms: Terms, parts: list[Term], width: int) -> Term | None:
    """The vector that the parts are neighbouring parts of, if they are."""
    first = parts[0]
    if any(part.op != first.op or part.args[0] is not first.args[0] for part in parts):
        return None
    if first.op == "part":
        start = first.args[1]
        if [part.args[1] for part in parts] == list(range(start, start + width * len(parts), width)):
            return terms.part(first.args[0], start, start + width * len(parts))
    if first.op == "lin":
        inner, piece, dtype = first.args
        start = piece.rows[0] if piece.rows else 0
        bands = [(start + place * width, start + (place + 1) * width) for place in range(len(parts))]
        if (
            piece.rows
            and piece.out is None
            and all(
                part.args[1:] == (replace(piece, rows=band), dtype) for part, band in zip(parts, bands, strict=True)
            )
        ):
            return terms.lin(inner, replace(piece, rows=(start, bands[-1][1])), width * len(parts), dtype)
    return None
