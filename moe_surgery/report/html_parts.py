"""Parts that pages are made of. What is given as markup is markup; words and names are escaped before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from moe_surgery.report.outcomes import Outcomes
from moe_surgery.report.pictures.svg import safe

WIDE, NARROW = 960.0, 340.0
"""The widths that pictures are drawn for."""


class Sample(Protocol):
    """Seconds of one size, as :class:`moe_surgery.timing.blocks.Sample` has them."""

    @property
    def calls(self) -> int: ...
    @property
    def old(self) -> float: ...
    @property
    def new(self) -> float: ...
    def words(self) -> str: ...


class Speed(Protocol):
    """What was timed, as :class:`moe_surgery.timing.blocks.Speed` has it."""

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def how(self) -> str: ...
    @property
    def samples(self) -> Sequence[Any]: ...
    def sentence(self) -> str: ...
    def size(self, sample: Any) -> str: ...


def tag(name: str, inside: str, **attributes: str) -> str:
    """An element around markup; empty attributes are left out."""
    told = "".join(f' {key.rstrip("_")}="{safe(value)}"' for key, value in attributes.items() if value)
    return f"<{name}{told}>{inside}</{name}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return tag("p", safe(text), class_=kind)


def chip(text: str, tone: str) -> str:
    """A letter or word on an outcome's colour."""
    return tag("span", safe(text), class_=f"chip {tone}")


def alarm(topic: str, text: str) -> str:
    """What went wrong, where nobody can overlook it."""
    return tag("div", tag("b", safe(topic)) + " " + safe(text), class_="alarm", role="alert")


def cell(inside: str, kind: str = "", head: str = "", *, span: int = 1) -> str:
    """A table's cell over ``span`` columns; ``head`` is said beside it where columns have no room for heads."""
    return tag("td", inside, class_=kind, colspan=str(span) if span > 1 else "", **{"data-h": head})


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells; columns ``numbers`` are aligned to the right."""
    shown = [tag("th", safe(head), class_="n" if at in numbers else "", scope="col") for at, head in enumerate(heads)]
    body = "".join(tag("tr", "".join(line)) for line in lines)
    head = tag("thead", tag("tr", "".join(shown))) if heads else ""
    return tag("table", head + tag("tbody", body), class_="stack")


def both(wide: str, narrow: str) -> str:
    """A picture for wide pages and the same for narrow ones."""
    return tag("figure", tag("div", wide, class_="wide") + tag("div", narrow, class_="narrow"))


def speeds_section(speeds: Sequence[Speed]) -> Iterator[str]:
    """Medians before and after, and what the comparison says, with its spread."""
    yield tag("h2", "Speed")
    lines = []
    for speed in speeds:
        for sample in speed.samples:
            lines.append(
                [
                    cell(safe(speed.what) + " " + tag("span", safe(speed.name), class_="q mono")),
                    cell(safe(speed.size(sample)), head="at"),
                    cell(milliseconds(sample.old), "n", "old"),
                    cell(milliseconds(sample.new), "n", "new"),
                    cell(safe(sample.words())),
                    cell(str(sample.calls), "n", "calls"),
                ]
            )
    yield table(("what", "at", "old, median", "new, median", "", "calls"), lines, (2, 3, 5))
    how = sorted({speed.how for speed in speeds})
    yield paragraph(f"Calls of old and new were timed {', '.join(how)}.", "q")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def versions_section(report: Outcomes) -> Iterator[str]:
    """What the findings hold for."""
    yield tag("h2", "Versions")
    pairs = [*report.versions.items(), *([("plan", report.fingerprint)] if report.fingerprint else [])]
    yield tag("dl", "".join(tag("dt", safe(name)) + tag("dd", safe(value), class_="mono") for name, value in pairs))
