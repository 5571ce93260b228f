"""Engines in processes of their own, and what each is asked to time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from moe_surgery.engine.orders import VARIABLE, Prove
from moe_surgery.engine.timing.graphs import own_graphs
from moe_surgery.errors import SurgeryError, UnsupportedError

CONTEXT = 32
"""Tokens of a sequence before the decoding steps that are timed."""
STEPS, TURNS = 10, 20
"""How many decoding steps a turn has, and how many turns there are, if two seconds are enough for them."""
_SECONDS, _FEWEST, _WARM_UP = 2.0, 5, 4

What = Literal["decode step", "prefill"]


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
    prove: Prove = "sample"

    @property
    def most_steps(self) -> int:
        """How far a sequence goes beyond its context."""
        return 1 + _WARM_UP + STEPS

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**told)


@dataclass(frozen=True)
class Times:
    """Seconds of each forward of the model, and of each whole step of the engine, by the clock."""

    device: list[float]
    wall: list[float]


class Engine:
    """A child process with one engine, its own folder of compiled graphs, and what surgery reported."""

    def __init__(self, job: Job, folder: Path) -> None:
        """Returns at once. The engine's process and its folder are the caller's to end and to remove."""
        folder.mkdir()
        self.model = job.model
        environ = {key: value for key, value in os.environ.items() if key != VARIABLE}
        environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_CACHE_ROOT": own_graphs(folder / "cache"),
        }
        command = [sys.executable, "-m", "moe_surgery.engine.timing.one_engine", json.dumps(asdict(job))]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True)

    def report(self) -> dict[str, Any] | None:
        """What surgery did, once the engine stands. Raises what kept it from starting, with its exit code."""
        report: dict[str, Any] | None = self._told()["report"]
        return report

    def ask(self, sequences: int, tokens: int, steps: int) -> Times:
        """The times of ``steps`` decoding steps of ``sequences`` after ``tokens``, or of a prefill for no steps."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"sequences": sequences, "tokens": tokens, "steps": steps}) + "\n")
        self._child.stdin.flush()
        return Times(**self._told())

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()

    def _told(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            raise UnsupportedError(
                f"the process of an engine for {self.model} ended with {code} (-v shows what it said)"
            )
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise SurgeryError(told["error"]).with_code(told["exit_code"])
        return told


@dataclass(frozen=True)
class Turns:
    """What one engine's turns took: medians of each turn, in seconds, of ``calls`` calls in all."""

    device: tuple[float, ...]
    wall: tuple[float, ...]
    calls: int


def measure(engines: Sequence[Engine], what: What, sequences: int, tokens: int) -> list[Turns]:
    """Ask the engines in turns, each once a turn; ``tokens`` are those of a prefill. Two turns before warm up."""
    found: list[list[Times]] = [[] for _ in engines]
    decoding = what == "decode step"
    context, first = (CONTEXT, _WARM_UP) if decoding else (tokens, 0)
    for _ in range(2):  # the first is no measure: it may compile kernels
        rough = max(_rough(engine.ask(sequences, context, first + 1 if decoding else 0)) for engine in engines)
    calls = min(TURNS * (STEPS if decoding else 1), max(int(_SECONDS / rough), _FEWEST))
    steps = min(STEPS, max(calls // _FEWEST, 1)) if decoding else 1
    for _ in range(calls // steps):
        for times, engine in zip(found, engines, strict=True):
            times.append(engine.ask(sequences, context, first + steps if decoding else 0))
    return [
        Turns(
            tuple(statistics.median(turn.device[first:]) for turn in times),
            tuple(statistics.median(turn.wall[first:]) for turn in times),
            len(times) * steps,
        )
        for times in found
    ]


def _rough(times: Times) -> float:
    return times.wall[-1]
