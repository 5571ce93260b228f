"""What the processes of a run did, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.terminal import Note, indented, render
from moe_surgery.report.words import plural

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.report.receipt import Receipt

STYLES = {"operated": "green", "kept": "green", "unpatched": "yellow", "failed": "red", "audited": "green"}


def run_data(run: str, receipts: Sequence[Receipt], error: str | None, exit_code: int) -> dict[str, Any]:
    """JSON-ready data of the versioned schema ``moe-surgery/run/1``."""
    told = {} if error is None else {"error": error}
    listed = [receipt.to_json() for receipt in receipts]
    return {"schema": "moe-surgery/run/1", "run": run, "receipts": listed, **told, "exit": exit_code}


def run_sentence(receipts: Sequence[Receipt]) -> str:
    """The run in one line: ``1 model in 2 processes: 2 operated, 0 unpatched, 0 failed``."""
    models = len({receipt.name for receipt in receipts})
    found = {outcome: sum(receipt.outcome == outcome for receipt in receipts) for outcome in STYLES}
    counts = [f"{count} {outcome}" for outcome, count in found.items() if count or outcome not in ("kept", "audited")]
    processes = len({receipt.pid for receipt in receipts})
    held = "process" if processes == 1 else "processes"
    return f"{plural(models, 'model')} in {processes} {held}: {', '.join(counts)}"


def render_run(run: str, receipts: Sequence[Receipt], console: Console) -> None:
    """Print one line per process, and below them the report of each model: once, if all ranks have the same."""
    indented(console, f"run {run}", 0, "bold")
    for name, group in groupby(receipts, key=lambda receipt: receipt.name):
        ranks = list(group)
        indented(console, name, 0, "bold")
        for receipt in ranks:
            indented(console, _line(receipt), 4, STYLES[receipt.outcome])
            if receipt.error is not None:
                indented(console, receipt.error, 8, "")
        _reports(ranks, console)
    indented(console, run_sentence(receipts), 0, "bold")


def _line(receipt: Receipt) -> str:
    parts = [f"rank {receipt.rank} of {receipt.world}", f"pid {receipt.pid}", receipt.outcome]
    parts += [f"plan {receipt.fingerprint}"] if receipt.fingerprint else []
    parts += [f"ledger {receipt.ledger}"] if receipt.ledger else []
    return "  ".join(parts)


def _reports(ranks: Sequence[Receipt], console: Console) -> None:
    reported = [receipt for receipt in ranks if receipt.report is not None]
    same = alike(reported)
    for receipt in reported[:1] if same else reported:
        assert receipt.report is not None
        alone = len(reported) == 1
        whose = "measured on this rank; the other ranks did the same" if same else "of this rank alone"
        notes: list[Note] = [] if alone else [(f"rank {receipt.rank}", whose)]
        render(report_from_json(receipt.report), console, notes)


def alike(reported: Sequence[Receipt]) -> bool:
    """Whether ranks that have a report did the same."""
    return len({repr(_substance(receipt)) for receipt in reported}) <= 1


def _substance(receipt: Receipt) -> Any:
    """What ranks that did the same agree in: not the numbers measured, nor the time taken."""
    assert receipt.report is not None
    numbers = ("proof", "reason")
    return [{key: site[key] for key in site if key not in numbers} for site in receipt.report.get("sites", [])]
