"""Activations that are spelled out in arithmetic, as several of transformers' own classes do, known by their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from moe_surgery.read.meaning.term import Term

_PLACES = (-40.0, -6.0, -2.5, -1.25, -0.5, -0.01, 0.01, 0.3, 0.9, 1.7, 3.0, 8.0, 40.0)
_KNOWN = ("gelu", "gelu_tanh")  # they differ by up to 5e-4
_NEAR = 1e-5
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "erf": math.erf,
    "tanh": math.tanh,
    "square": lambda x: x * x,
    "pow 2": lambda x: x * x,
    "pow 3": lambda x: x**3,
}


def twice(argument: Term, factor: Term, functions: Mapping[str, Callable[[float], float]]) -> str | None:
    """The activation of ``argument`` that half its product with ``factor`` is, by its name; None if it is none.

    ``functions`` are activations by name. A factor is 1 and a sum, product or function of nothing but ``argument``.
    """
    if factor.op != "add" or len(factor.args) != 2 or factor.size != argument.size:
        return None
    if not any(part.op == "const" and part.args[0] == 1.0 for part in factor.args):
        return None
    products = []
    for place in _PLACES:
        value = _value(factor, argument, place)
        if value is None:
            return None
        products.append(value * place / 2)
    for name in _KNOWN:
        wanted = [functions[name](place) for place in _PLACES]
        if all(abs(one - two) <= _NEAR * max(abs(two), 1.0) for one, two in zip(products, wanted, strict=True)):
            return name
    return None


def _value(term: Term, argument: Term, place: float) -> float | None:
    """What a term is where ``argument`` is ``place``; None if it comes of anything else."""
    if term is argument:
        return place
    if term.op == "const":
        return float(term.args[0])
    if term.op not in ("add", "mul") and term.op not in _FUNCTIONS:
        return None
    parts = list(term.args)
    known = [place] if term.op == argument.op == "add" and _taken_out(parts, argument.args) else []
    for part in parts:
        value = _value(part, argument, place)
        if value is None:
            return None
        known.append(value)
    if term.op in _FUNCTIONS:
        return _FUNCTIONS[term.op](known[0])
    return sum(known) if term.op == "add" else math.prod(known)


def _taken_out(parts: list[Term], summands: Sequence[Term]) -> bool:
    """Whether ``summands`` are among the ``parts`` of a sum, from which they are taken: sums in sums are one."""
    if any(all(part is not summand for part in parts) for summand in summands):
        return False
    for summand in summands:
        del parts[next(number for number, part in enumerate(parts) if part is summand)]
    return True
