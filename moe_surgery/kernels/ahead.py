"""Compiling ahead in processes of their own, which need no GPU, while this one does something else.

Triton holds Python's lock for much of the time that it compiles, so threads would hold up whatever else runs. The
processes fill Triton's cache on disk, in which :func:`~moe_surgery.kernels.warming.warm` then finds what it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import triton_key

from moe_surgery.kernels.arguments import Terms, stand_ins
from moe_surgery.kernels.launch import compile_only
from moe_surgery.kernels.warming import variants

_ROOT = str(Path(__file__).resolve().parents[2])
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); from moe_surgery.kernels import apart"
_COMMAND = (sys.executable, "-E", "-S", "-c", f"{_CHILD}; apart.serve()")
"""Nothing that is to happen whenever Python starts happens in it; it finds modules where this process does."""
_HANG = 300.0
"""Seconds after which the processes are given up."""

Job = tuple[str, str, str]
"""Module and name of a function of Triton's, and its specialisation, as Triton writes that down."""


class Compilers:
    """At most so many processes that make themselves ready at once, and compile when it is known what.

    Whatever fails in it holds nothing up: what couldn't be compiled is compiled where it is wanted.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        """Returns at once."""
        self._device = device
        self._processes: list[subprocess.Popen[bytes]] = []
        self.underway = False
        """Whether a process has done a job: until then all are making themselves ready."""
        self._pool = ThreadPoolExecutor(most + 2)
        self._target = self._pool.submit(self._start, most)
        self._pool.submit(triton_key)  # a digest of half a gigabyte, which Triton keeps

    def begin(
        self, terms: Sequence[Terms], dtype: torch.dtype, numbers: Sequence[int] | None = None
    ) -> Callable[[], None]:
        """Begin to compile every kernel that blocks of these ``terms`` may ever launch; may be called once.

        With ``numbers`` of tokens, those that they need. Returns what waits for that, and for the processes to end.
        """
        done = self._pool.submit(self._compile, terms, dtype, numbers)

        def wait_for_it() -> None:
            done.exception()
            self.end()

        return wait_for_it

    def end(self) -> None:
        """Have the processes end, whatever they do. May be called again."""
        self._target.exception()  # none is started after this
        for process in self._processes:
            process.kill()
            process.wait()
        self._pool.shutdown()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
        self._processes.clear()

    def _start(self, most: int) -> dict[str, Any]:
        """The GPU that is compiled for. Triton builds a module to ask its driver for it, in a process of its own."""
        for _ in range(most):
            with suppress(OSError):  # where no more processes are to be had
                self._processes.append(_started())
        with self._on_device():
            return vars(driver.active.get_current_target())

    def _compile(self, terms: Sequence[Terms], dtype: torch.dtype, numbers: Sequence[int] | None) -> None:
        target = self._target.result()
        with self._on_device():
            found = dict.fromkeys(job for each in terms for job in specializations(each, dtype, self._device, numbers))
        jobs = iter([*reversed(found)])  # those for many tokens take longest
        served: list[Future[None]] = [self._pool.submit(self._serve, each, target, jobs) for each in self._processes]
        wait(served, _HANG)

    def _serve(self, process: subprocess.Popen[bytes], target: dict[str, Any], jobs: Iterator[Job]) -> None:
        """Give a process one job after the other, as long as there are any and it does them."""
        assert process.stdout is not None
        with suppress(OSError):
            _tell(process, target)
            for job in jobs:
                _tell(process, job)
                if not process.stdout.readline():
                    break
                self.underway = True

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _tell(process: subprocess.Popen[bytes], what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")
    process.stdin.flush()


def _started() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    with suppress(BrokenPipeError):
        _tell(process, [_ROOT, *sys.path])
    return process


def specializations(
    terms: Terms, dtype: torch.dtype, device: torch.device, numbers: Sequence[int] | None = None
) -> list[Job]:
    """All that Triton would compile for blocks of these ``terms``, or for some ``numbers`` of tokens."""
    found: dict[Job, None] = {}
    own, others = threading.get_ident(), knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **more: Any) -> Any:
        if threading.get_ident() != own:  # what another thread launches meanwhile is to be compiled
            return None if others is None else others(fn=fn, compile=compile, **more)
        found[fn.module, fn.name, compile["specialization_data"]] = None
        return True

    weights = stand_ins(terms, dtype, device)
    knobs.runtime.jit_cache_hook = note
    try:
        for choice, tokens in variants(terms, dtype, numbers):
            compile_only(weights.router.new_empty(tokens, terms.hidden), weights, terms, choice)
    finally:
        knobs.runtime.jit_cache_hook = others
    return list(found)
