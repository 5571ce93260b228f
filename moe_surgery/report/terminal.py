"""A report as text: one row per kind of site, the sentence to quote last.

A row stands on one line where the console is wide enough for all rows, else its second half goes below the first. The
text depends on the report and the width alone, so two runs can be compared line by line; times stand in the last line
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from moe_surgery.report.folded_paths import fold_paths
from moe_surgery.report.outcomes import Memory, ModelCheck, Outcome, Outcomes
from moe_surgery.report.rows import Row, rows
from moe_surgery.report.words import duration, error, plural, ratio, size, writable

SYMBOLS: dict[Outcome, str] = {
    "replaced": "~",
    "kept": "=",
    "missed": "?",
    "refused": "!",
    "right": "✓",
    "wrong": "≠",
    "not comparable": "?",
}
STYLES: dict[Outcome, str] = {
    "replaced": "green",
    "kept": "cyan",
    "missed": "yellow",
    "refused": "red",
    "right": "green",
    "wrong": "red",
    "not comparable": "yellow",
}
Note = tuple[str, str]
"""A finding below the rows: its topic in one word of at most eight letters, and a sentence."""

_GAP = "  "
_TOPIC = 9
_DONE = {
    "planned": ("to replace", "to keep", "nothing touched"),
    "verified": ("proven", "kept", "the model is as it was"),
    "applied": ("replaced", "kept", ""),
    "rolled back": ("replaced", "kept", "rolled back: the model is as it was"),
    "undone": ("replaced", "kept", "undone: the model is as it was"),
}


def render(report: Outcomes, console: Console, notes: Sequence[Note] = ()) -> None:
    """Print ``report``; ``notes`` are further findings, put before the last line."""
    header(report, console)
    line = _Line.of_scan if report.done == "scanned" else _Line.of
    _table(console, [line(row) for row in rows(report)])
    if report.model_check is not None:
        notes = [*(("model", line) for line in model_sentences(report.model_check)), *notes]
    if report.memory != Memory():
        notes = [("weights", memory_sentence(report.memory)), *notes]
    for topic, text in notes:
        indented(console, text, _TOPIC, "", hanging=topic)
    _line(console, sentence(report), "bold" if report.exit_code == 0 else "bold red")


def _scan_sentence(report: Outcomes) -> str:
    readable, sites = len(report.kept), len(report.steps)
    return f"{plural(sites, 'site')}: {readable} readable, {sites - readable} not · {duration(report.seconds)}"


def header(report: Outcomes, console: Console) -> None:
    """Print the model's name and the versions that the findings hold for."""
    text = Text(writable(report.model, console), "bold")
    versions = " · ".join(f"{name} {version}" for name, version in report.versions.items())
    if versions:
        text.append(writable(_GAP + versions, console), "not bold dim")
    _wrapped(console, text, 0)


def sentence(report: Outcomes) -> str:
    """The report in one line, made to be quoted: ``20 replaced, 0 kept, 0 missed, 0 refused · 12.3 s``.

    Of an audit: ``20 right, 0 wrong, 0 not comparable · 12.3 s``; of a scan: ``68 sites: 68 readable, 0 not · 1.2 s``.
    """
    if report.done == "scanned":
        return _scan_sentence(report)
    if report.done == "audited":
        counts = f"{len(report.right)} right, {len(report.wrong)} wrong, {len(report.incomparable)} not comparable"
        return f"{counts} · {duration(report.seconds)}"
    word, kept, remark = _DONE[report.done]
    counts = f"{len(report.replaced)} {word}, {len(report.kept)} {kept}, {len(report.missed)} missed"
    parts = [f"{counts}, {len(report.refused)} refused", remark, duration(report.seconds)]
    parts.append(", ".join(f"{name} {duration(seconds)}" for name, seconds in report.phases))
    return " · ".join(part for part in parts if part)


def in_short(report: Outcomes) -> str:
    """The report in one line for a log: by what blocks were replaced, and why the first ones weren't."""
    parts = [sentence(report)]
    found = rows(report)
    swaps = dict.fromkeys(f"{row.kind} → {row.target}" for row in found if row.outcome == "replaced")
    parts += [", ".join(swaps)] if swaps else []
    left = [row for row in found if row.outcome in ("missed", "refused")]
    parts += [f"{row.outcome}: {', '.join(row.paths)}: {row.reason}" for row in left[:1]]
    return "; ".join(parts) + (f" (and {plural(len(left) - 1, 'more reason')})" if len(left) > 1 else "")


def memory_sentence(memory: Memory) -> str:
    """What the operation cost in bytes, and what ``undo`` keeps alive."""
    parts = [f"{size(memory.moved)} moved by reference", f"{size(memory.new)} new"]
    parts.append(f"{size(memory.kept)} of originals kept for undo" if memory.kept else "no originals kept")
    return " · ".join(parts)


def model_sentences(check: ModelCheck) -> list[str]:
    """What the check of the whole model found, and what it could not say, a line each."""
    lines = []
    if check.parts:
        names = ", ".join(part or "the whole model" for part in check.parts)
        found = f"does the same around the new blocks, which are within {error(check.apart)} of the old ones"
        lines.append(f"{names}, run on {plural(check.tokens, 'token')}, {found}")
    lines += [f"NOT RUN: {part or 'the whole model'}: {reason}" for part, reason in check.not_run]
    if check.not_called:
        paths = ", ".join(path for path, _ in fold_paths(check.not_called))
        lines.append(f"no run came to {paths}: what the model does around there isn't checked")
    return lines


@dataclass(frozen=True)
class _Line:
    """The cells of a row, and the lines below it."""

    symbol: str
    style: str
    paths: tuple[str, ...]
    label: str
    numbers: tuple[str, str, str]
    below: tuple[str, ...]

    def writable(self, console: Console) -> _Line:
        """The same in the characters that the console can show."""
        count, rel, margin = (writable(number, console) for number in self.numbers)
        return _Line(
            symbol=writable(self.symbol, console),
            style=self.style,
            paths=tuple(writable(path, console) for path in self.paths),
            label=writable(self.label, console),
            numbers=(count, rel, margin),
            below=self.below,
        )

    @classmethod
    def of(cls, row: Row) -> _Line:
        rel = f"rel {error(row.error)}" if row.error is not None else ""
        margin = f"margin {ratio(row.margin)}" if row.margin is not None else ""
        if 0 < row.proven < len(row.sites):
            margin += f", {row.proven} of {len(row.sites)} proven"
        computes = " · ".join(part for part in (row.sentence, row.rule and f"rule {row.rule}") if part)
        below = [computes] if computes else []
        if row.outcome not in ("replaced", "right"):
            below.append(row.reason)
        elif row.note:
            below.append(row.note)
        return cls(
            symbol=SYMBOLS[row.outcome],
            style=STYLES[row.outcome],
            paths=row.paths,
            label=f"{row.kind} → {row.target}" if row.target else row.kind,
            numbers=(f"×{len(row.sites)}", rel, margin),
            below=tuple(below),
        )

    @classmethod
    def of_scan(cls, row: Row) -> _Line:
        readable = row.outcome == "kept"
        return cls(
            symbol="✓" if readable else "?",
            style="green" if readable else "yellow",
            paths=row.paths,
            label=row.kind,
            numbers=(f"×{len(row.sites)}", "", ""),
            below=(row.sentence if readable and row.sentence else row.reason,),
        )


def _table(console: Console, lines: Sequence[_Line]) -> None:
    if not lines:
        _line(console, "no module here looks like a sparse-MoE block", "yellow")
        return
    lines = [line.writable(console) for line in lines]
    numbers = [max(cell_len(line.numbers[column]) for line in lines) for column in range(3)]
    tail = sum(len(_GAP) + width for width in numbers if width)
    path_width = max(cell_len(path) for line in lines for path in line.paths)
    label_width = max(cell_len(line.label) for line in lines)
    wide = 2 + path_width + len(_GAP) + label_width + tail <= console.width
    if not wide:
        path_width, label_width = min(path_width, max(console.width - 2 - tail, 1)), 0
    for line in lines:
        count, rel, margin = line.numbers
        cells = [_GAP + count.rjust(numbers[0]), _GAP + rel.ljust(numbers[1]), _GAP + margin]
        first = Text(f"{line.symbol} ", line.style)
        # A path has no blanks to wrap at: one that is too long goes on below itself, and the numbers follow it.
        *parts, last = chop_cells(line.paths[0], console.width - 2) or [""]
        for part in parts:
            _print(console, first.append(part, "bold"))
            first = Text("  ", line.style)
        first.append(last, "bold")
        if cell_len(last) > path_width:
            _print(console, first)
            first = Text("  ", line.style)
        first.append(" " * (path_width + 2 - first.cell_len))
        if wide:
            first.append(_GAP + line.label.ljust(label_width))
        _print(console, first.append("".join(cells)))
        for path in line.paths[1:]:
            _print(console, Text(f"  {path}", line.style))
        for below in (*([] if wide else [line.label]), *line.below):
            indented(console, below, 4)


def indented(
    console: Console, text: str, indent: int, style: str = "dim", *, hanging: str = "", below: str = ""
) -> None:
    """Print ``text`` wrapped at words, every line ``indent`` columns in, without blanks at line ends.

    ``hanging`` stands before the first line, in the columns that are left free, and ``below`` before the others.
    """
    _wrapped(console, Text(writable(text, console), style), indent, hanging, below)


def _wrapped(console: Console, text: Text, indent: int, hanging: str = "", below: str = "") -> None:
    for line in text.wrap(console, max(console.width - indent, 1), overflow="fold"):
        _print(console, Text(hanging.ljust(indent)).append_text(line))
        hanging = below


def _line(console: Console, text: str, style: str = "") -> None:
    indented(console, text, 0, style)


def _print(console: Console, text: Text) -> None:
    text.rstrip()
    console.print(text, overflow="fold", highlight=False)
