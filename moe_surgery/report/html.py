"""A report as one page that needs nothing but itself: no script, no font, no picture from elsewhere.

It says what the terminal's report says, in the same words and numbers, and shows what a terminal can't.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.html_kinds import AUDITED, kinds
from moe_surgery.report.html_parts import (
    NARROW,
    WIDE,
    Speed,
    alarm,
    both,
    cell,
    chip,
    paragraph,
    speeds_section,
    table,
    tag,
    versions_section,
)
from moe_surgery.report.json import dumps
from moe_surgery.report.outcomes import Memory, Outcomes
from moe_surgery.report.page_style import page_style
from moe_surgery.report.pictures.palette import TONES
from moe_surgery.report.pictures.strip import counts, has_gaps, legend, strip
from moe_surgery.report.pictures.svg import safe
from moe_surgery.report.run import alike, run_sentence
from moe_surgery.report.terminal import Note, memory_sentence, model_sentences, sentence

if TYPE_CHECKING:
    from moe_surgery.report.receipt import Receipt

_ALWAYS = ("replaced", "kept", "missed", "refused")
_WORDS = {("planned", "replaced"): "to replace", ("planned", "kept"): "to keep", ("verified", "replaced"): "proven"}


def page(
    report: Outcomes, *, notes: Sequence[Note] = (), speeds: Sequence[Speed] = (), error: str | None = None
) -> str:
    """The page of one report; ``notes`` are its further findings, ``error`` what the command ended with."""
    body = [
        *_title(report.model),
        paragraph(sentence(report), "q lead"),
        *_failure(error, report.exit_code),
        *_body(report, notes, speeds, ""),
    ]
    return _document(report.model, body)


def run_page(run: str, receipts: Sequence[Receipt], error: str | None, exit_code: int) -> str:
    """The page of a run: what each process told, and the report of each model."""
    body = [*_title(run, "run "), paragraph(run_sentence(receipts), "q lead"), *_failure(error, exit_code)]
    body += [tag("h2", "Processes"), _processes(receipts)]
    number = 0
    for name, group in groupby(receipts, key=lambda receipt: receipt.name):
        reported = [receipt for receipt in group if receipt.report is not None]
        same = alike(reported)
        for receipt in reported[:1] if same else reported:
            assert receipt.report is not None
            whose = "" if len(reported) == 1 else f", rank {receipt.rank}"
            notes: list[Note] = []
            if whose:
                said = "measured on this rank; the other ranks did the same" if same else "of this rank alone"
                notes = [(f"rank {receipt.rank}", said)]
            number += 1
            report = report_from_json(receipt.report)
            body += [tag("h2", safe(name + whose)), paragraph(sentence(report), "q lead")]
            body += _body(report, notes, (), f"r{number}-")
    return _document(f"run {run}", body)


def _title(place: str, kind: str = "") -> Iterator[str]:
    """The own name of a model or a run, large; where it lies, if that was said too, below."""
    name = place.rstrip("/").rpartition("/")[2] if place.startswith(("/", "./", "../", "~")) else place
    yield tag("h1", safe(kind + (name or place)))
    if name and name != place:
        yield tag("p", tag("code", safe(place)), class_="q")


def _body(report: Outcomes, notes: Sequence[Note], speeds: Sequence[Speed], mark: str) -> Iterator[str]:
    yield _figures(report)
    if not report.steps:
        yield paragraph("no module here looks like a sparse-MoE block")
    else:
        yield tag("h2", "The model, layer by layer")
        yield both(strip(report, WIDE), strip(report, NARROW))
        yield _key(report)
        yield from kinds(report, mark)
    if speeds:
        yield from speeds_section(speeds)
    timed = {speed.sentence() for speed in speeds}
    found = [*notes]
    if report.model_check is not None:
        found = [*(("model", line) for line in model_sentences(report.model_check)), *found]
    if report.memory != Memory():
        found = [("weights", memory_sentence(report.memory)), *found]
    found = [note for note in found if note[1] not in timed]
    if found:
        yield tag("h2", "Further findings")
        yield table((), [[cell(safe(topic), "q f"), cell(safe(text))] for topic, text in found])
    yield from versions_section(report)
    yield tag("details", tag("summary", "The whole record, as JSON") + tag("pre", safe(dumps(report.to_json()))))


def _figures(report: Outcomes) -> str:
    """How many sites ended how, large."""
    found = counts(report)
    names = AUDITED if found.keys() & set(AUDITED) else _ALWAYS
    shown = []
    for name in names:
        word = _WORDS.get((report.done, name), name)
        zero = "" if found.get(name) else "zero"
        shown.append(tag("div", tag("b", str(found.get(name, 0))) + tag("span", safe(word)), class_=zero))
    return tag("div", "".join(shown), class_="counts")


def _key(report: Outcomes) -> str:
    items = [
        tag("span", chip(letter, tone) + safe(_WORDS.get((report.done, name), name)))
        for letter, name, tone in legend(report)
    ]
    if has_gaps(report):
        items.append(tag("span", "an empty cell has no site that looks like a sparse-MoE block"))
    return tag("div", "".join(items), class_="key")


def _failure(error: str | None, code: int) -> Iterator[str]:
    if error is not None:
        yield alarm("error", f"{error} (exit code {code})")
    elif code:
        yield alarm("exit code", str(code))


def _processes(receipts: Sequence[Receipt]) -> str:
    if not receipts:
        return paragraph("no process of this run loaded a model")
    lines = []
    for receipt in receipts:
        outcome = chip(receipt.outcome, "bad" if receipt.exit_code else TONES[receipt.outcome])
        cells = [cell(outcome), cell(safe(receipt.name)), cell(f"{receipt.rank} of {receipt.world}", "f", "rank")]
        cells += [cell(str(receipt.pid), "f", "pid"), cell(safe(receipt.fingerprint or "none"), "mono", "plan")]
        cells.append(cell(safe(receipt.ledger or "none"), "mono", "ledger"))
        lines.append(cells)
        if receipt.error is not None:
            lines.append([cell(safe(receipt.error), "q", span=len(cells))])
    return table(("", "model", "rank", "pid", "plan", "ledger"), lines)


def _document(title: str, body: Sequence[str]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{safe(title)} · moe-surgery</title><style>{page_style()}</style>"
    )
    top = paragraph("moe-surgery report", "q")
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{top}{"".join(body)}</main></body></html>\n'
    )
