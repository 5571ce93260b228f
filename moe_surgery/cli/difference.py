"""The command that compares two plans, reports or runs: diff."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery.cli import exits
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.report.difference import Change, Record


def diff(screen: Screen, old: Path, new: Path) -> int:
    """Say what differs; ends with 10 if anything does."""
    from moe_surgery.report.difference import changes, difference_data, difference_sentence, render_difference

    screen.will_read(*_files(old), *_files(new))
    before, after = ({record.name: record for record in read(path)} for path in (old, new))
    if before.keys() != after.keys():
        strange = sorted(before.keys() ^ after.keys())
        raise UsageError(f"{old} and {new} tell of different models: only one has {', '.join(strange)}")
    found: list[tuple[str, tuple[Change, ...]]] = [(name, changes(before[name], after[name])) for name in before]
    code = exits.CHANGES if any(listed for _, listed in found) else exits.DONE
    screen.result(
        lambda console: render_difference(str(old), str(new), found, console),
        difference_data(str(old), str(new), found, code),
        difference_sentence(found),
    )
    return code


def _files(path: Path) -> list[Path]:
    """What :func:`read` reads."""
    from moe_surgery.engine.receipts import files

    return files(path) if path.is_dir() else [path]


def read(path: Path) -> list[Record]:
    """The records at ``path``: a plan, a report or a run as JSON, or the folder of a run's receipts.

    Raises :class:`UsageError` for anything else. Only a run has more than one record, each with a name.
    """
    from moe_surgery.planning.plan import SCHEMA as PLAN
    from moe_surgery.planning.plan import Plan
    from moe_surgery.report.difference import Record
    from moe_surgery.report.from_json import report_from_json
    from moe_surgery.report.json import loads

    if path.is_dir():
        from moe_surgery.engine.receipts import check, first_failure, read_all

        receipts = read_all(path)
        if not receipts:
            raise UsageError(f"{path}: a folder without receipts of a run")
        records = _run(receipt.to_json() for receipt in receipts)
        failure = first_failure(receipts)
        if failure is None:
            check(receipts)
        elif not records:  # else there is something to compare: what was wrong, say, with what is right now
            raise failure
        return records
    try:
        data = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: neither a plan, a report nor a run")
    try:
        if data.get("schema") == PLAN:
            return [Record("", Plan.load(path).report(), {})]
        if data.get("schema") == "moe-surgery/run/1":
            return _run(data["receipts"])
        return [Record("", report_from_json(data), _speeds(data))]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: not a report: {error!r}") from error


def _run(receipts: Any) -> list[Record]:
    from moe_surgery.report.difference import Record
    from moe_surgery.report.from_json import report_from_json

    return [
        Record(f"{told['model']} load {told['load']} rank {told['rank']}", report_from_json(told["report"]), {})
        for told in receipts
        if told["report"] is not None
    ]


def _speeds(data: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The ratios that a report of ``apply`` or ``bench`` has, each by what was timed."""
    found = {}
    for told in (*data.get("speed", ()), *data.get("steps", ())):
        name = f"{told.get('what', 'MoE block')} of {told.get('block', told.get('part'))}"
        for sample in told["samples"]:
            size = f"{sample['sequences']} × {sample['tokens']} tokens"
            if sample["ratio"] is not None:
                if not all(isinstance(sample[key], int | float | None) for key in ("ratio", "spread")):
                    raise TypeError(f"no ratio: {sample}")
                found[f"{name}, {size}"] = (sample["ratio"], sample["spread"])
    return found
