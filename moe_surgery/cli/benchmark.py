"""The command that times: bench, on a model loaded here or in two engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery.cli.apply_verify import Job, begin, block_speeds, load, named
from moe_surgery.cli.options import Proof
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import ModelError, UsageError

if TYPE_CHECKING:
    from moe_surgery.report.terminal import Note
    from moe_surgery.timing.blocks import Speed


@dataclass(frozen=True)
class Times:
    """What to time: ``tokens`` of a call of a block, ``sequences`` of a decoding step."""

    tokens: tuple[int, ...]
    sequences: tuple[int, ...]

    @property
    def prefill(self) -> tuple[int, ...]:
        """Tokens of a prefill; that of one is like a step."""
        return tuple(tokens for tokens in self.tokens if tokens > 1)


def bench(screen: Screen, job: Job, times: Times, *, eager: bool) -> int:
    """Load, operate, time steps and each kind of block against the originals, and put these back."""
    import moe_surgery
    from moe_surgery.timing.steps import measure_steps

    if eager:
        raise UsageError("--eager is for --engine; here nothing is compiled anyway")
    plan = begin(screen, job)
    name = plan.model if plan else job.model
    with screen.progress() as progress, named(name):
        opened = load(job, plan, name, progress)
        progress.phase("operating")
        report = moe_surgery.apply(
            opened.module,
            plan,
            margin=job.proof.margin,
            seed=job.proof.seed,
            on_progress=progress.step,
            **({} if plan else job.choice.as_plan()),
        )
        assert report.transaction is not None
        steps = measure_steps(
            opened.module,
            report.transaction,
            sequences=times.sequences,
            prefill=times.prefill,
            on_phase=progress.phase,
        )
        blocks = block_speeds(report, progress, times.tokens)
        moe_surgery.undo(report)
    screen.report(
        report.but(model=name),
        notes=_notes([*steps.speeds, *blocks], steps.left_out),
        speeds=[*steps.speeds, *blocks],
        more={"speed": [speed.to_json() for speed in blocks], **_steps(steps.speeds, steps.left_out)},
        svg=job.svg,
    )
    return report.exit_code


def bench_engine(screen: Screen, job: Job, times: Times, *, eager: bool) -> int:
    """Time an engine's steps with surgery and without. Nothing is said of single blocks."""
    from moe_surgery.engine.timing import asking, both_engines
    from moe_surgery.packs.registry import load_packs
    from moe_surgery.report.from_json import report_from_json

    screen.will_write(job.svg, html=job.html)
    screen.will_read(*(job.choice.pack or ()))
    _check(job)
    load_packs(job.choice.pack or None)
    asked = asking.Job(
        job.model,
        times.sequences,
        times.prefill,
        tuple(job.choice.pack) if job.choice.pack else None,
        job.loading.dtype.value,
        job.trust.trust_remote_code,
        eager,
        job.choice.target,
    )
    with screen.progress() as progress:
        compared = both_engines.compare(asked, progress.phase)
    left_out = () if compared.speeds else ("nothing was replaced in the engine",)
    report = report_from_json(compared.report).but(model=job.model)
    screen.report(
        report,
        notes=_notes(compared.speeds, left_out),
        speeds=compared.speeds,
        more={"speed": [], **_steps(compared.speeds, left_out)},
        svg=job.svg,
    )
    return report.exit_code


def _check(job: Job) -> None:
    """Raise :class:`UsageError` for what an engine can't be asked."""
    path = Path(job.model)
    if path.suffix == ".json" or path.is_file():
        raise UsageError(f"--engine takes a model, and {job.model} is a file")
    if not path.is_dir() and job.model.startswith((".", "/", "~")):
        raise ModelError(f"{job.model}: no such directory")
    flags = [flag for flag in job.choice.given() if flag not in ("--pack", "--target")]
    flags += ["--device"] if job.loading.device != "cpu" else []
    flags += ["--margin or --seed"] if job.proof != Proof() else []
    if flags:
        raise UsageError(f"{', '.join(flags)}: not with --engine, which does as `moe-surgery run` does")


def _notes(speeds: Sequence[Speed], left_out: Sequence[str]) -> list[Note]:
    return [*(("speed", speed.sentence()) for speed in speeds), *(("speed", f"no step: {why}") for why in left_out)]


def _steps(speeds: Sequence[Speed], left_out: Sequence[str]) -> dict[str, Any]:
    return {"steps": [speed.to_json() for speed in speeds], "no_step": list(left_out)}
