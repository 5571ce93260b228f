"""The command that finds tile sizes for a model's blocks on the GPU that is here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery.cli import exits
from moe_surgery.cli.options import Trust
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import UnsupportedError, UsageError
from moe_surgery.report.words import plural

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.tuning.search import Tuned
    from moe_surgery.tuning.shapes import Shape

_DIFFERS = 1.02
"""Less than this is no gain: two timings of the same differ by as much."""


@dataclass(frozen=True)
class Job:
    """What ``tune`` was asked for: ``seconds`` for each shape, of what each of ``ranks`` holds, ``e4m3`` or not."""

    model: str
    tokens: tuple[int, ...]
    seconds: float
    ranks: int
    dtype: str | None
    e4m3: bool = False


def tune(screen: Screen, job: Job, trust: Trust) -> int:
    """Time candidates for every shape of the model's blocks, store the fastest, and show what they gain."""
    import moe_surgery
    from moe_surgery.targets.folded.fitness import missing

    for reason in missing():
        raise UnsupportedError(reason)
    import torch

    from moe_surgery.kernels.choice import own_folder
    from moe_surgery.targets.folded.fold import folded_terms
    from moe_surgery.tuning.compiling import begin_compiling, compilers
    from moe_surgery.tuning.shapes import shapes
    from moe_surgery.tuning.table import DTYPES, TOKENS
    from moe_surgery.tuning.table import tune as tune_shape

    numbers = job.tokens or TOKENS
    found: list[tuple[Shape, Path, Sequence[Tuned]]] = []
    with screen.progress() as progress:
        progress.phase(f"reading {job.model}")
        plan = moe_surgery.plan(
            job.model, target="folded", device="cuda", dtype=job.dtype, trust_remote_code=trust.trust_remote_code
        )
        dtype = plan.costs.dtype if plan.costs else ""
        if dtype not in DTYPES:
            raise UsageError(
                f"tables are for {' and '.join(DTYPES)}; {job.model} is in {dtype}, --dtype says otherwise"
            )
        specs = [step.spec for step in plan.report().replaced if step.spec is not None]
        wanted = shapes(specs, dtype, job.ranks, scaled=job.e4m3)
        if not wanted:
            raise UsageError(f"{job.model} has no block for the folded kernels; moe-surgery plan says why")
        folder, workers = own_folder(torch.cuda.get_device_name()), os.cpu_count() or 1
        with compilers(workers) as pool:
            for shape in wanted:
                progress.phase(f"compiling candidates for {shape.name}")
                terms = folded_terms(shape.spec, dtype, scaled=job.e4m3)
                for waiting in begin_compiling(pool, workers, terms, dtype, numbers):
                    waiting.result()
                progress.phase(f"timing {shape.name}")
                table = tune_shape(shape.spec, dtype, numbers, job.seconds, progress.step, scaled=job.e4m3)
                path = folder / f"{shape.name}.json"
                table.write(path, dtype)
                found.append((shape, path, table.found))
                torch.cuda.empty_cache()
    data = {"schema": "moe-surgery/tune/1", "model": job.model, "dtype": dtype, "tables": _data(found)}
    screen.result(lambda console: _render(found, console), {**data, "exit": exits.DONE}, _sentence(found))
    return exits.DONE


def _render(found: Sequence[tuple[Shape, Path, Sequence[Tuned]]], console: Console) -> None:
    from moe_surgery.report.terminal import indented

    for shape, path, rows in found:
        indented(console, f"{shape.name}  {plural(shape.count, 'block')}", 0, "bold")
        for row in rows:
            gain = f"{row.before / row.us:.2f}× faster" if row.before / row.us > _DIFFERS else "as before"
            gain += ": the fastest tiles computed something else" if row.wrong else ""
            indented(console, f"{plural(row.tokens, 'token')}  {row.before:.1f} → {row.us:.1f} µs  {gain}", 4, "")
        indented(console, f"stored as {path}", 4, "")
    indented(console, _sentence(found), 0, "bold")


def _sentence(found: Sequence[tuple[Shape, Path, Sequence[Tuned]]]) -> str:
    rows = [row for _, _, listed in found for row in listed]
    better = sum(row.before / row.us > _DIFFERS for row in rows)
    return f"{plural(len(found), 'table')}: {better} of {plural(len(rows), 'size')} faster than before"


def _data(found: Sequence[tuple[Shape, Path, Sequence[Tuned]]]) -> list[dict[str, Any]]:
    return [
        {
            "shape": shape.name,
            "blocks": shape.count,
            "file": str(path),
            "rows": [{"tokens": row.tokens, "us": row.us, "before_us": row.before, "wrong": row.wrong} for row in rows],
        }
        for shape, path, rows in found
    ]
