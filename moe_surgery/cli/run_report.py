"""The commands about other programs' models: run, audit, report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_surgery.cli import exits
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import SurgeryError, UsageError
from moe_surgery.targets import check_name

if TYPE_CHECKING:
    from moe_surgery.engine.orders import Orders
    from moe_surgery.report.receipt import Receipt


@dataclass(frozen=True)
class Launch:
    """All that ``run`` or ``audit`` was asked for."""

    command: tuple[str, ...]
    packs: tuple[str, ...] | None
    plan: Path | None
    prove: Literal["sample", "all"]
    on_failure: Literal["stop", "keep"]
    target: str
    run: Path | None
    audit: bool = False
    html: Path | None = None


def launch(screen: Screen, job: Launch) -> int:
    """Start the command under orders, wait for it, and tell what its processes did."""
    from moe_surgery.engine.launch.child import environment, supervise
    from moe_surgery.engine.launch.visibility import check_command
    from moe_surgery.engine.receipts import first_failure, read_all

    screen.will_write(job.html)
    screen.will_read(job.plan, *(job.packs or ()))
    orders = _orders(job)
    try:
        environ = environment(orders, os.environ)
        check_command(job.command, environ)
        screen.say(f"moe-surgery: receipts go to {orders.run}")
        code = supervise(job.command, environ)
        receipts = read_all(orders.run)
    finally:
        if job.run is None:
            with suppress(OSError):  # it stays if anything is in it
                os.rmdir(orders.run)
    fault = _fault(receipts, orders.asked)
    told = fault is not None and (code == exits.DONE or first_failure(receipts) is not None)
    if told and fault is not None:
        return _tell(screen, orders.run, receipts, str(fault), fault.exit_code, job.html)
    also = f"; {fault}" if fault is not None else ""
    _tell(screen, orders.run, receipts, None, code, job.html, ended=f"the command itself failed{also}")
    if code != exits.DONE:
        screen.say(f"moe-surgery: the command ended with exit code {code}{also}")
    return code


def report(screen: Screen, run: Path, html: Path | None) -> int:
    """Tell what the processes of a run did."""
    from moe_surgery.engine.receipts import check_run, files, read_all

    check_run(run)
    screen.will_write(html)
    screen.will_read(*files(run))
    receipts = read_all(run)
    fault = _fault(receipts)
    if fault is not None:
        return _tell(screen, str(run), receipts, str(fault), fault.exit_code, html)
    return _tell(screen, str(run), receipts, None, exits.DONE, html)


def _orders(job: Launch) -> Orders:
    """The orders for the child, of which all that can be is checked now: an engine takes long to start."""
    from moe_surgery.engine.orders import Orders
    from moe_surgery.engine.receipts import new_run
    from moe_surgery.packs.registry import load_packs

    load_packs(job.packs)
    check_name(job.target)
    if job.plan is not None:
        if job.target != "auto":
            raise UsageError(f"{job.plan} is a plan, which says what is built; --target {job.target} would change it")
        from moe_surgery.planning.plan import Plan

        Plan.load(job.plan)
    packs = None
    if job.packs is not None:
        packs = tuple(os.path.abspath(pack) if pack.endswith(".toml") else pack for pack in job.packs)
    plan = None if job.plan is None else os.path.abspath(job.plan)
    run = _folder() if job.run is None else str(new_run(job.run))
    return Orders(run, packs, plan, job.prove, job.on_failure, job.target, job.audit)


def _folder() -> str:
    """A folder that stays: its receipts can be looked at again."""
    return tempfile.mkdtemp(prefix=f"moe-surgery-run-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-")


def _fault(receipts: Sequence[Receipt], asked: str = "surgery") -> SurgeryError | None:
    from moe_surgery.engine.receipts import check

    try:
        check(receipts, asked)
    except SurgeryError as error:
        return error
    return None


def _tell(
    screen: Screen,
    run: str,
    receipts: Sequence[Receipt],
    error: str | None,
    code: int,
    html: Path | None,
    *,
    ended: str | None = None,
) -> int:
    """Write the report, what is unpatched, and the error last. Returns ``code``.

    ``ended`` is what a page says of a code that isn't of an error here.
    """
    from moe_surgery.report.run import render_run, run_data, run_sentence

    line = None if error is None else " ".join(error.split())

    def page() -> str:
        from moe_surgery.report.html import run_page

        return run_page(run, receipts, line or (ended if code else None), code)

    data = run_data(run, receipts, line, code)
    screen.result(lambda console: render_run(run, receipts, console), data, run_sentence(receipts))
    for receipt in receipts:
        if receipt.outcome == "unpatched":
            screen.say(f"warning: {receipt.model} runs unpatched in process {receipt.pid}: {receipt.error}")
    if line is not None:
        screen.say(f"error: {line}")
    screen.page(html, page, code)
    return code
