"""What each process of a run did, one file each: processes that fork, die and restart can't tell it otherwise."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import get_args

from moe_surgery.errors import ReceiptError, SurgeryError, UsageError
from moe_surgery.report.files import write_whole
from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.json import dumps, loads
from moe_surgery.report.receipt import SCHEMA, Outcome, Receipt

_NAME = re.compile(r".*-rank\d+-\d+(\.\d+)?\.json")


_CLAIM = "run.pid"


SURGERY = "surgery"


_TYPES: dict[str, type | tuple[type, ...]] = {
    "pid": int,
    "rank": int,
    "world": int,
    "model": str,
    "outcome": str,
    "fingerprint": (str, type(None)),
    "ledger": (str, type(None)),
    "report": (dict, type(None)),
    "error": (str, type(None)),
    "exit_code": int,
    "stage": int,
    "load": int,
}


def new_run(run: str | Path) -> Path:
    """The folder ``run``, made if need be, as an absolute path.

    Raises :class:`UsageError` if it can't be made or written to, has receipts already, which would pass for those of
    a later run, or is that of another process's run that goes on.
    """
    folder = Path(run).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't make {run}: {error.strerror or error}") from error
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"can't write to {run}: {error.strerror or error}") from error
    if files(folder):
        raise UsageError(f"{run} has the receipts of an earlier run; give another folder")
    _claim(folder)
    return folder


def _claim(folder: Path) -> None:
    """Note in ``folder`` that this process's run is there. Raises :class:`UsageError` if another's is, and goes on."""
    path = folder / _CLAIM
    try:
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
            return
        noted = path.read_text(encoding="utf-8")
        if noted.isdecimal() and int(noted) != os.getpid() and lives(int(noted)):
            raise UsageError(f"{folder} belongs to a run that still goes on, process {noted}; give another folder")
        write_whole(path, str(os.getpid()))
    except OSError as error:
        raise UsageError(f"can't write to {folder}: {error.strerror or error}") from error


def check_run(run: str | Path) -> None:
    """Raise :class:`UsageError` for a folder that no run has anything in: neither receipts nor that it began there."""
    if not files(Path(run)) and not (Path(run) / _CLAIM).exists():
        raise UsageError(f"{run}: not the folder of a run: no receipts are in it")


def write(run: str | Path, receipt: Receipt) -> Path:
    """Leave ``receipt`` in the folder ``run``, whole or not at all, and return its path.

    The same process's earlier receipt for the same load of a model is replaced. Raises :class:`UsageError` if the
    folder can't be written to.
    """
    load = "" if receipt.load == 1 else f".{receipt.load}"
    path = Path(run) / f"{_file_safe(receipt.model)}-rank{receipt.rank}-{receipt.pid}{load}.json"
    write_whole(path, dumps(receipt.to_json()))
    return path


def read_all(run: str | Path) -> tuple[Receipt, ...]:
    """The newest receipt of every rank for every load of a model, and all of living processes, in order.

    That is by model, load, rank and process. A process that was restarted has written again, so what the earlier one
    left is passed over; but what a process tells isn't as long as it lives: two engines may share a run. Raises
    :class:`UsageError` naming the folder, or the file that is no receipt.
    """
    told = sorted((_read(path) for path in files(Path(run))), key=lambda read: (read[1], read[0].pid))
    newest = {(receipt.model, receipt.load, receipt.rank): receipt for receipt, _ in told}
    living = [receipt for receipt, _ in told if lives(receipt.pid)]
    return tuple(sorted({id(receipt): receipt for receipt in (*newest.values(), *living)}.values(), key=_order))


def check(receipts: Iterable[Receipt], asked: str = SURGERY) -> None:
    """Raise unless every rank of every model tells of the same operation.

    The first failure is raised with its own message and exit code. Otherwise :class:`ReceiptError` is raised if there
    is no receipt, if a rank has none, or if ranks of one model differ in outcome or plan within a pipeline stage:
    stages hold different layers. Of several engines every rank tells as often. Ledgers aren't compared: under tensor
    parallelism each rank has weights of its own. ``asked`` is what was asked for, in words.
    """
    told = sorted(receipts, key=_order)
    if not told:
        raise ReceiptError(f"{asked} was asked for, but no process loaded a model with it")
    failure = first_failure(told)
    if failure is not None:
        raise failure
    for (model, _), group in groupby(told, key=lambda receipt: (receipt.model, receipt.load)):
        ranks = list(group)
        _check_ranks(model, ranks)
        for stage in sorted({receipt.stage for receipt in ranks}):
            mine = [receipt for receipt in ranks if receipt.stage == stage]
            _check_equal(model, "outcomes", mine, [receipt.outcome for receipt in mine])
            _check_equal(model, "plans", mine, [receipt.fingerprint or "none" for receipt in mine])


def first_failure(receipts: Iterable[Receipt]) -> SurgeryError | None:
    """The error of the first receipt that tells of a failure, or of an audit that went on with a wrong layer.

    :func:`check` raises it.
    """
    failing = (each for each in receipts if each.outcome == "failed" or (each.outcome == "audited" and each.exit_code))
    failed = min(failing, key=_order, default=None)
    if failed is None:
        return None
    where = f"rank {failed.rank} of {failed.world}: " if failed.world > 1 else ""
    message = f"{failed.model}: {where}{failed.error or 'failed without saying why'}"
    return SurgeryError(message).with_code(failed.exit_code or SurgeryError.exit_code)


def files(run: Path) -> list[Path]:
    """The receipts in the folder ``run``, in no order. Raises :class:`UsageError` if it can't be looked into."""
    try:
        return [path for path in run.iterdir() if _NAME.fullmatch(path.name)]
    except OSError as error:
        raise UsageError(f"{run}: not the folder of a run: {error.strerror or error}") from error


def _check_ranks(model: str, ranks: Sequence[Receipt]) -> None:
    worlds = sorted({receipt.world for receipt in ranks})
    if len(worlds) > 1:
        raise ReceiptError(f"{model}: processes disagree on how many ranks there are: {_listed(worlds)}")
    missing = sorted(set(range(worlds[0])) - {receipt.rank for receipt in ranks})
    if missing:
        word = "rank" if len(missing) == 1 else "ranks"
        raise ReceiptError(f"{model}: no receipt of {word} {_listed(missing)} (of {worlds[0]})")


def _check_equal(model: str, what: str, ranks: Sequence[Receipt], values: Sequence[str]) -> None:
    told: dict[int, list[str]] = {}
    for receipt, value in zip(ranks, values, strict=True):
        told.setdefault(receipt.rank, []).append(value)
    if len({tuple(sorted(mine)) for mine in told.values()}) > 1:
        listed = ", ".join(f"rank {rank} {' and '.join(mine)}" for rank, mine in told.items())
        raise ReceiptError(f"{model}: {what} differ between ranks: {listed}")


def _read(path: Path) -> tuple[Receipt, int]:
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: not a receipt: no file")
    try:
        written = path.stat().st_mtime_ns
        data = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: not a receipt: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a receipt: {error}") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise UsageError(f"{path}: not a receipt of schema {SCHEMA}")
    if data.keys() != _TYPES.keys():
        raise UsageError(f"{path}: not a receipt: {_listed(sorted(data.keys() ^ _TYPES.keys()))} missing or unknown")
    wrong = [name for name, kind in _TYPES.items() if not isinstance(data[name], kind)]
    wrong += ["outcome"] if data["outcome"] not in get_args(Outcome) else []
    wrong += ["rank"] if not wrong and not 0 <= data["rank"] < data["world"] else []
    if wrong:
        raise UsageError(f"{path}: not a receipt: {wrong[0]} can't be {data[wrong[0]]!r}")
    if data["report"] is not None:
        try:
            report_from_json(data["report"])
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return Receipt(**data), written


def lives(pid: int) -> bool:
    """Whether a process of this host still runs; one that ended and wasn't waited for doesn't."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # ended by now, or a system without such files
        return not Path("/proc/self/stat").exists()
    return told.rpartition(")")[2].split()[0] not in ("Z", "X")


def _order(receipt: Receipt) -> tuple[str, int, int, int]:
    return receipt.model, receipt.load, receipt.rank, receipt.pid


def _file_safe(model: str) -> str:
    """``model`` as part of a file name; if characters had to go, a digest tells it from others that lost the same."""
    name = re.sub(r"[^\w.-]+", "_", model)[:80]
    return name if name == model else f"{name}.{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
