"""The model as a strip: a cell for each layer, with a letter and a colour for what became of its block."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_surgery.report.outcomes import Outcomes, Step
from moe_surgery.report.pictures.palette import TONES
from moe_surgery.report.pictures.svg import MONO, drawing, element, fitted, label, title

LETTERS = {
    "replaced": "R",
    "kept": "K",
    "missed": "M",
    "refused": "X",
    "right": "✓",
    "wrong": "≠",
    "not comparable": "?",
}
_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_CELL, _GAP, _LEFT, _HEAD = 22, 3, 34, 22


def strip(report: Outcomes, width: float) -> str:
    """Every site, those of one place in the model in a row; an index without a site is left open."""
    parts, y = [], 0.0
    for name, cells in _groups(report.steps).items():
        parts.append(label(0, y + 13, fitted(name, width, 12, MONO), "m"))
        y += _HEAD
        if list(cells) == [None]:
            parts.append(_cell(cells[None], _LEFT, y))
            y += _CELL + 16
            continue
        known = {number: step for number, step in cells.items() if number is not None}
        fit = int((width - _LEFT + _GAP) // (_CELL + _GAP))
        per = max(fit - fit % 10, 10) if fit >= 10 else fit
        for first in range(0, max(known) + 1, per):
            parts.append(label(_LEFT - 8, y + 15, str(first), "m q", "end"))
            for number in range(first, min(first + per, max(known) + 1)):
                x = _LEFT + (number - first) * (_CELL + _GAP)
                parts.append(_cell(known[number], x, y) if number in known else _open(x, y))
            y += _CELL + _GAP
        y += 14
    told = f"{len(report.steps)} sites: " + ", ".join(f"{count} {name}" for name, count in counts(report).items())
    return drawing(width, max(y - 10, 1), told, *parts)


def legend(report: Outcomes) -> list[tuple[str, str, str]]:
    """``(letter, outcome, tone)`` of each outcome that occurs."""
    return [(LETTERS[name], name, TONES[name]) for name in counts(report)]


def counts(report: Outcomes) -> dict[str, int]:
    """How many sites ended in each outcome that occurs."""
    listed = [step.outcome for step in report.steps]
    return {name: listed.count(name) for name in LETTERS if name in listed}


def has_gaps(report: Outcomes) -> bool:
    """Whether a strip of ``report`` leaves an index open."""
    return any(
        None not in cells and len(cells) <= max(number for number in cells if number is not None)
        for cells in _groups(report.steps).values()
    )


def _groups(steps: Sequence[Step]) -> dict[str, dict[int | None, Step]]:
    """The sites by their paths without the layer's index, then by that index: the first number in a path."""
    groups: dict[str, dict[int | None, Step]] = {}
    for step in steps:
        found = list(_INDEX.finditer(step.path))
        if not found:
            groups.setdefault(step.path or "the root module", {})[None] = step
            continue
        at = found[0]
        name = f"{step.path[: at.start()]}N{step.path[at.end() :]}"
        groups.setdefault(name, {})[int(at.group())] = step
    return _merged(groups)


def _merged(groups: dict[str, dict[int | None, Step]]) -> dict[str, dict[int | None, Step]]:
    """One row for a block and for what is inside it, as its experts alone, where no layer has both."""
    found: dict[str, dict[int | None, Step]] = {}
    for name in sorted(groups):
        outer = next((other for other in found if name.startswith(f"{other.partition(' or ')[0]}.")), None)
        if outer is None or None in groups[name] or found[outer].keys() & groups[name].keys():
            found[name] = groups[name]
            continue
        block = outer.partition(" or ")[0]
        found[f"{outer} or {name.removeprefix(block)}"] = {**found.pop(outer), **groups[name]}
    first = {name: list(groups).index(name.partition(" or ")[0]) for name in found}
    return dict(sorted(found.items(), key=lambda item: first[item[0]]))


def _cell(step: Step, x: float, y: float) -> str:
    square = element("rect", x=x, y=y, width=_CELL, height=_CELL, rx=3, class_=TONES[step.outcome])
    letter = label(x + _CELL / 2, y + 15.5, LETTERS[step.outcome], "i", "middle")
    return element("g", title(f"{step.path}: {step.outcome}"), square, letter)


def _open(x: float, y: float) -> str:
    return element("rect", x=x + 0.5, y=y + 0.5, width=_CELL - 1, height=_CELL - 1, rx=3, class_="line")
