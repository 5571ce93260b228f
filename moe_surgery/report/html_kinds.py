"""The part of a page about each kind of block: what it computes, how it was proven, why it was passed over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from textwrap import shorten

from moe_surgery.report.html_parts import NARROW, WIDE, both, cell, chip, paragraph, table, tag
from moe_surgery.report.outcomes import Outcomes, Step
from moe_surgery.report.pictures.anatomy import after, before
from moe_surgery.report.pictures.ladder import ladder
from moe_surgery.report.pictures.palette import TONES
from moe_surgery.report.pictures.strip import LETTERS
from moe_surgery.report.pictures.svg import safe
from moe_surgery.report.pictures.weight_map import weight_map
from moe_surgery.report.rows import Row, rows
from moe_surgery.report.words import error, plural, ratio

_LONGEST_REASON = 110
AUDITED = ("right", "wrong", "not comparable")
"""Outcomes of layers that are only asked."""


def kinds(report: Outcomes, mark: str) -> Iterator[str]:
    """A table with a line for each kind of site, then a part for each. ``mark`` keeps their links apart in a page."""
    found = rows(report)
    steps = {step.path: step for step in report.steps}
    yield tag("h2", "Each kind of block")
    yield _overview(found, mark)
    for number, row in enumerate(found):
        yield _kind(row, [steps[path] for path in row.sites], report, f"{mark}kind-{number}")


def _overview(found: Sequence[Row], mark: str) -> str:
    lines = []
    for number, row in enumerate(found):
        # A long path breaks where one of its names ends.
        path = safe(", ".join(row.paths) or "the root module").replace(".", "<wbr>.")
        link = tag("a", path, href=f"#{mark}kind-{number}", class_="mono")
        margin = ratio(row.margin) if row.margin is not None else ""
        if 0 < row.proven < len(row.sites):
            margin += f", {row.proven} of {len(row.sites)} proven"
        lines.append(
            [
                cell(chip(LETTERS[row.outcome], TONES[row.outcome]) + link),
                cell(safe(_label(row)) + _why(row)),
                cell(f"×{len(row.sites)}", "n"),
                cell(error(row.error), "n", "error") if row.error is not None else cell("", "n"),
                cell(safe(margin), "n", "margin" if margin else ""),
            ]
        )
    # A plan has measured nothing.
    columns = 5 if any(row.error is not None or row.margin is not None for row in found) else 3
    heads = ("site", "class → target", "sites", "error", "margin")[:columns]
    return table(heads, [line[:columns] for line in lines], (2, 3, 4)[: columns - 2])


def _why(row: Row) -> str:
    """The beginning of the reason why a row's sites were passed over; all of it stands further down."""
    if row.outcome in ("replaced", "right"):
        return ""
    return tag("div", safe(shorten(row.reason, _LONGEST_REASON, placeholder=" …")), class_="q why")


def _label(row: Row) -> str:
    return f"{row.kind} → {row.target}" if row.target else row.kind


def _kind(row: Row, steps: Sequence[Step], report: Outcomes, name: str) -> str:
    worst = min(steps, key=lambda step: step.verdict.margin if step.verdict else math.inf)
    parts = [tag("header", chip(LETTERS[row.outcome], TONES[row.outcome]) + tag("h3", safe(_label(row))))]
    parts.append(tag("p", tag("code", safe(", ".join(row.paths))) + safe(f" · {plural(len(steps), 'site')}")))
    if row.sentence:
        parts.append(paragraph(row.sentence, "q"))
    if row.rule:
        parts.append(paragraph(f"rule {row.rule}", "q"))
    if row.outcome not in ("replaced", "right"):
        parts.append(tag("p", tag("b", safe(row.outcome)) + ": " + safe(row.reason)))
    elif row.note:
        parts.append(paragraph(row.note, "q"))
    parts += _anatomy(row, steps[0], report)
    if worst.verdict is not None:
        parts += _proof(worst, len([step for step in steps if step.verdict]))
    if steps[0].weights and steps[0].spec is not None:
        spec, weights = steps[0].spec, steps[0].weights
        goes = (
            "go" if row.outcome in AUDITED or (row.outcome == "replaced" and report.done == "applied") else "would go"
        )
        parts.append(tag("h4", f"Where its tensors {goes}"))
        parts.append(both(weight_map(spec, weights, WIDE), weight_map(spec, weights, NARROW)))
    parts += _trail(worst)
    return tag("article", "".join(parts), id=name)


def _anatomy(row: Row, step: Step, report: Outcomes) -> Iterator[str]:
    if step.spec is None:
        return
    when = "as the checkpoint has it" if row.outcome in AUDITED else "before"
    figures = [tag("figure", before(step.spec, step.weights, f"{when}: {row.kind}"))]
    if row.outcome == "replaced" and row.target:
        said = {
            "planned": "As apply would build it.",
            "verified": "As it was built and proven; the model has the old block.",
            "undone": "As it was until it was undone.",
        }
        caption = f"{said.get(report.done, '')} What is framed takes the old block’s place.".strip()
        drawn = after(step.spec, step.weights, row.target)
        figures.append(tag("figure", drawn + tag("figcaption", caption)))
    yield tag("div", "".join(figures), class_="pair")


def _proof(step: Step, proven: int) -> Iterator[str]:
    verdict = step.verdict
    assert verdict is not None
    whose = f"of {step.path}" if proven > 1 else ""
    yield tag("h4", safe(f"How far from the reference {whose}".strip()))
    if verdict.mutants or math.isfinite(verdict.reading_error):
        yield both(ladder(verdict, WIDE), ladder(verdict, NARROW))
    # An audit's reasons speak of a layer; nothing was swapped.
    said = f"{step.reason if step.outcome in AUDITED and step.outcome != 'right' else verdict.reason}."
    if verdict.bound > 0:
        said += f" The band is what a right block may be off, {error(verdict.bound)} on tokens of unit scale."
    if any(mutant.family != "unit" for mutant in verdict.mutants):
        said += " Other tokens have other scales: a mutant’s line starts where the block itself is on the same tokens."
    least = "; of the sites proven it has the least margin" if proven > 1 else ""
    yield tag("figcaption", safe(said[:-1] + least + "." if least else said))


def _trail(step: Step) -> Iterator[str]:
    if not step.trail:
        return
    yield tag("h4", safe(f"The nearest rule’s clauses at {step.path or 'the root module'}"))
    lines = [
        [
            cell(
                tag("span", "✓" if clue.held else "✗", class_="held" if clue.held else "fails")
                + " "
                + safe(clue.clause)
            ),
            cell(safe(clue.wanted), head="wanted"),
            cell(safe(clue.measured), head="measured"),
        ]
        for clue in step.trail
    ]
    yield table(("clause", "wanted", "measured"), lines)
