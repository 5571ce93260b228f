"""The error ladder: noise, old block, new block and every mutant by name, on one logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_surgery.prove.verdict import Mutant, Verdict
from moe_surgery.report.pictures.svg import drawing, element, fitted, label, title
from moe_surgery.report.words import error, ratio

_ROW, _TALL, _TOP, _NUMBERS = 22.0, 36.0, 30.0, 150.0
_UNIT, _MUTANT, _NOISE = "unit", "ink", "noise of the dtype"


@dataclass(frozen=True)
class _Rung:
    """A line: a distance from the reference, and the block's own on the same tokens, where that is held against it."""

    name: str
    value: float
    kind: str
    own: float | None = None
    number: str = ""


def ladder(verdict: Verdict, width: float) -> str:
    """Every distance from the reference that the proof measured; the band is what a right block may be off.

    A mutant's line starts where the block itself is on the tokens that show the mutant best. The row of a wrong block
    is in the colour of failure, with a bar from the band's edge to where the block is.
    """
    rungs = _rungs(verdict)
    narrow = width < 600
    left, right = (0.0, width) if narrow else (0.36 * width, width - _NUMBERS)
    row = _TALL if narrow else _ROW
    place, decades = _axis(rungs, verdict.bound, left + 14, right - 14)
    bottom = _TOP + row * len(rungs)
    # Where names stand above their lines, neither band nor grid runs through them.
    spans = [(_TOP + row * n + 16, _TOP + row * n + 36) for n in range(len(rungs))] if narrow else [(_TOP - 6, bottom)]
    # Below band and grid, which go on being seen.
    parts = [
        element("rect", x=0, y=_TOP + row * n, width=width, height=row, class_="flaw")
        for n, rung in enumerate(rungs)
        if rung.kind == "bad"
    ]
    step = math.ceil(len(decades) / ((right - left) / 46))
    for top, end in spans:
        if verdict.bound > 0:
            edge = place(verdict.bound)
            parts.append(element("rect", x=left, y=top, width=edge - left, height=end - top, class_="tint"))
            parts.append(element("line", x1=edge, x2=edge, y1=top, y2=end, class_="limit"))
        parts += [element("line", x1=x, x2=x, y1=top, y2=end, class_="line") for x, _ in decades]
    parts += [label(x, _TOP - 12, text, "m q", "middle") for x, text in decades[::step]]
    if not narrow:
        parts.append(label(width, _TOP - 12, "distance · margin", "s q", "end"))
    for number, rung in enumerate(rungs):
        y = _TOP + row * number + row / 2
        if rung.kind == "bad" and 0 < verdict.bound < rung.value:
            start, line = place(verdict.bound), y + 8 if narrow else y
            parts.append(element("rect", x=start, y=line - 2, width=place(rung.value) - start, height=4, class_="bad"))
        parts.append(_drawn(rung, y, place, width, left, narrow))
    measured = ", ".join(f"{rung.name} {rung.number}" for rung in rungs if rung.kind != _MUTANT)
    told = f"distances from the reference: {measured}, and {len(verdict.mutants)} wrong blocks"
    return drawing(width, bottom + 4, told, *parts)


def _rungs(verdict: Verdict) -> list[_Rung]:
    build = verdict.build_error
    tone = "good" if verdict.passed else "muted" if verdict.powerless else "bad"
    old = _fault(verdict.reading_error, verdict.bound) or ("same" if build is not None else tone)
    found = [
        _Rung(_NOISE, verdict.noise, "muted", number=error(verdict.noise)),
        # Where there is one only, an engine's swapped block or one that is audited, it is neither old nor new.
        _Rung(
            "the block" if build is None else "old block",
            verdict.reading_error,
            old,
            number=error(verdict.reading_error),
        ),
    ]
    if build is not None:
        found.append(_Rung("new block", build, _fault(build, verdict.bound) or tone, number=error(build)))
    block = {
        family.name: family.reading_error if family.build_error is None else family.build_error
        for family in verdict.families
    }
    mutants = sorted(verdict.mutants, key=lambda mutant: mutant.margin)
    return found + [_mutant(mutant, block.get(mutant.family)) for mutant in mutants]


def _fault(value: float, bound: float) -> str | None:
    return "bad" if bound > 0 and value > bound else None


def _mutant(mutant: Mutant, own: float | None) -> _Rung:
    where = "" if mutant.family == _UNIT else f" ({mutant.family} tokens)"
    return _Rung(
        mutant.name + where, mutant.distance, _MUTANT, own, f"{error(mutant.distance)} · {ratio(mutant.margin)}"
    )


def _axis(
    rungs: list[_Rung], bound: float, left: float, right: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From a distance to its place, and the decades; exactly 0 has a place before the first, ∞ one after the last."""
    values = [value for rung in rungs for value in (rung.value, rung.own) if value is not None] + [bound]
    finite = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    high = max(high, low + 1)
    zero, infinite = 0.0 in [rung.value for rung in rungs], math.inf in values
    first, last = left + (40 if zero else 0), right - (40 if infinite else 0)

    def place(value: float) -> float:
        if value <= 0:
            return left
        if math.isinf(value):
            return right
        return first + (math.log10(value) - low) / (high - low) * (last - first)

    marks = [(place(10.0**power), f"1e{power}" if power else "1") for power in range(low, high + 1)]
    return place, [*([(left, "0")] if zero else []), *marks, *([(right, "∞")] if infinite else [])]


def _drawn(rung: _Rung, y: float, place: Callable[[float], float], width: float, left: float, narrow: bool) -> str:
    x, line = place(rung.value), y + 8 if narrow else y
    wrong = rung.kind == "bad"
    parts = [title(f"{rung.name}: {rung.number}")]
    name, room, base = rung.name, left - 10, y + 4
    if narrow:  # or what wrong blocks are told apart by might be cut out of their names
        name, room, base = rung.name.replace(" tokens)", ")"), width - 110, y - 4
    bold = "s b bad" if wrong else "s b" if rung.kind != _MUTANT and rung.name != _NOISE else "s"
    parts.append(label(0, base, fitted(f"✗ {name}" if wrong else name, room, 12), bold))
    parts.append(label(width, base, rung.number, "m b bad" if wrong else "m", "end"))
    if rung.own is not None:
        start = place(rung.own)
        parts.append(element("line", x1=start, x2=x, y1=line, y2=line, class_="flow"))
        parts.append(element("circle", cx=start, cy=line, r=3, class_="hollow"))
    if rung.kind != _MUTANT:
        parts.append(element("path", d=_diamond(x, line), class_=rung.kind))
    else:
        parts.append(element("circle", cx=x, cy=line, r=4, class_=rung.kind))
    return element("g", *parts)


def _diamond(x: float, y: float) -> str:
    return f"M{x - 6:.1f} {y:.1f}L{x:.1f} {y - 6:.1f}L{x + 6:.1f} {y:.1f}L{x:.1f} {y + 6:.1f}Z"
