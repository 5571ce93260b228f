"""A whole engine's steps with and without surgery: two engines, each in a process of its own, asked in turns."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_surgery.engine.timing.asking import Engine, Job, Turns, What, measure
from moe_surgery.errors import UnsupportedError
from moe_surgery.timing.blocks import Sample, Speed, spread

NAME = "vLLM"
_TOGETHER, _APART = "each, in turns", "each, one engine after the other, since both didn't fit at once"


@dataclass(frozen=True)
class Compared:
    """The report of the surgery, and the engine's speeds; none if nothing was replaced."""

    report: dict[str, Any]
    speeds: tuple[Speed, ...]


def compare(job: Job, on_phase: Callable[[str], None]) -> Compared:
    """Time an engine with surgery, if it replaced anything, and one without.

    Each has its own folder of compiled graphs, which goes afterwards. Both stand at the same time and are asked in
    turns; where the second doesn't start beside the first, they follow each other. Raises :class:`UnsupportedError` if
    vLLM can't serve the model, and what surgery raised, with its exit code.
    """
    _check_installed()
    with tempfile.TemporaryDirectory(prefix="moe-surgery-bench-") as name, ExitStack() as ends:
        folder = Path(name)
        on_phase("starting an engine with surgery")
        new = Engine(replace(job, run=f"{folder}/run"), folder / "operated")
        ends.callback(new.end)
        report = new.report()
        assert report is not None
        if all(site["outcome"] != "replaced" for site in report["sites"]):
            return Compared(report, ())
        on_phase("starting an engine without surgery")
        old = Engine(job, folder / "plain")
        ends.callback(old.end)
        try:
            old.report()
        except UnsupportedError:
            old.end()
        else:
            on_phase("timing both engines in turns")
            return Compared(report, _speeds(_measure([old, new], job), _TOGETHER))
        on_phase("timing the engine with surgery")
        after = [turns for _, [turns] in _measure([new], job)]
        new.end()
        on_phase("starting and timing an engine without surgery")
        old = Engine(job, folder / "alone")
        ends.callback(old.end)
        old.report()
        before = _measure([old], job)
        apart = [(size, [*turns, late]) for (size, turns), late in zip(before, after, strict=True)]
        return Compared(report, _speeds(apart, _APART))


Size = tuple[What, int, int]
"""What is timed, of so many sequences, with so many tokens each."""


def sizes(job: Job) -> Iterator[Size]:
    yield from (("decode step", sequences, 1) for sequences in job.sequences)
    yield from (("prefill", 1, tokens) for tokens in job.prefill)


def _measure(engines: Sequence[Engine], job: Job) -> list[tuple[Size, list[Turns]]]:
    return [(size, measure(engines, *size)) for size in sizes(job)]


def _speeds(found: Sequence[tuple[Size, list[Turns]]], how: str) -> tuple[Speed, ...]:
    samples: dict[What, list[Sample]] = {}
    for (what, sequences, tokens), (old, new) in found:
        medians = statistics.median(old.device), statistics.median(new.device)
        calls = min(old.calls, new.calls)
        sample = Sample(tokens, calls, *medians, sequences, spread(old.device, new.device))
        samples.setdefault(what, []).append(sample)
    return tuple(Speed(NAME, tuple(each), what, how) for what, each in samples.items())


def _check_installed() -> None:
    """Raise what an engine's process would, before one is started; also if it is too new or old for surgery."""
    from moe_surgery.engine.model.seam import check_era
    from moe_surgery.targets.vllm.eras import look_up

    check_era(look_up())
