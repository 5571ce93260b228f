"""A whole engine's steps with and without surgery: two engines, one after the other, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_surgery.engine.orders import VARIABLE
from moe_surgery.errors import SurgeryError, UnsupportedError
from moe_surgery.timing.blocks import Sample, Speed

CONTEXT = 32
"""Tokens of a sequence before the decoding steps that are timed."""
NAME = "vLLM"
_HOW = "each, one engine after the other"


@dataclass(frozen=True)
class Job:
    """What to start and what to time.

    Surgery is done, with ``packs`` and to ``target``, if there is a folder ``run`` for receipts.

    ``sequences`` are those of a decoding step, ``prefill`` the tokens of one; ``dtype`` is as vLLM takes it. ``eager``
    is without compilation and graphs.
    """

    model: str
    sequences: tuple[int, ...]
    prefill: tuple[int, ...]
    packs: tuple[str, ...] | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    eager: bool = False
    target: str = "auto"
    run: str | None = None


@dataclass(frozen=True)
class Timed:
    """The median seconds of ``calls`` forwards of a whole model, with ``tokens`` for each of ``sequences``."""

    what: Literal["decode step", "prefill"]
    tokens: int
    sequences: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class Told:
    """What an engine's process leaves behind: its times, surgery's report, or the error that it ended with."""

    times: tuple[Timed, ...]
    report: dict[str, Any] | None
    error: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class Compared:
    """The report of the surgery, and the engine's speeds; none if nothing was replaced."""

    report: dict[str, Any]
    speeds: tuple[Speed, ...]


def compare(job: Job, on_phase: Callable[[str], None]) -> Compared:
    """Time an engine with surgery, then, if it replaced anything, one without.

    Each has its own folder of compiled graphs, which goes afterwards. Raises :class:`UnsupportedError` if vLLM can't
    serve the model, and what surgery raised, with its exit code.
    """
    _check_installed()
    with tempfile.TemporaryDirectory(prefix="moe-surgery-bench-") as folder:
        on_phase("starting and timing an engine with surgery")
        new = _started(replace(job, run=f"{folder}/run"), Path(folder, "operated"))
        assert new.report is not None
        if not new.times:
            return Compared(new.report, ())
        on_phase("starting and timing an engine without surgery")
        old = _started(job, Path(folder, "plain"))
    samples: dict[Literal["decode step", "prefill"], list[Sample]] = {}
    for before, after in zip(old.times, new.times, strict=True):
        calls = min(before.calls, after.calls)
        sample = Sample(before.tokens, calls, before.seconds, after.seconds, before.sequences)
        samples.setdefault(before.what, []).append(sample)
    return Compared(new.report, tuple(Speed(NAME, tuple(each), what, _HOW) for what, each in samples.items()))


def _check_installed() -> None:
    """Raise what an engine's process would, before one is started; also if it is too new or old for surgery."""
    from moe_surgery.engine.model.seam import check_era
    from moe_surgery.targets.vllm.eras import look_up

    check_era(look_up())


def _started(job: Job, folder: Path) -> Told:
    folder.mkdir()
    out = folder / "told.json"
    environ = {key: value for key, value in os.environ.items() if key != VARIABLE}
    environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "moe_surgery.engine.timing.one_engine", json.dumps(asdict(job)), str(out)]
    child = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
    try:
        code = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    if not out.exists():
        raise UnsupportedError(f"the process of an engine for {job.model} ended with {code} (-v shows what it said)")
    data = json.loads(out.read_text(encoding="utf-8"))
    told = Told(**{**data, "times": tuple(Timed(**each) for each in data["times"])})
    if told.error is not None:
        raise SurgeryError(told.error).with_code(told.exit_code)
    return told
