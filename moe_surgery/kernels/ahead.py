"""Compiling ahead in processes of their own, which need no GPU, while this one does something else.

Triton holds Python's lock for much of the time that it compiles, so threads would hold up whatever else runs. The
processes fill Triton's cache on disk, in which :func:`~moe_surgery.kernels.warming.warm` then finds what it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
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
_CHILD = (
    "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; from moe_surgery.kernels import apart"
)
_COMMAND = (sys.executable, "-E", "-S", "-c", f"{_CHILD}; apart.compile_all(**job['do'])")
"""Nothing that is to happen whenever Python starts happens in it; it finds modules where this process does."""
_HANG = 300.0
"""Seconds after which a process is given up; what it didn't compile is compiled where it is wanted."""


def begin(terms: Sequence[Terms], dtype: torch.dtype, device: torch.device, most: int) -> Callable[[], None]:
    """Begin to compile every kernel that blocks of these ``terms`` may ever launch, in at most so many processes.

    Returns what waits for them to end, in whichever way.
    """
    pool = ThreadPoolExecutor(1)
    done = pool.submit(_compiled, terms, dtype, device, most)
    pool.shutdown(wait=False)
    return done.result


def _compiled(terms: Sequence[Terms], dtype: torch.dtype, device: torch.device, most: int) -> None:
    """What a thread does of it lets go of Python's lock: Triton builds a module for its driver, and reads itself."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        jobs = [job for each in terms for job in specializations(each, dtype, device)]
        target = vars(driver.active.get_current_target())
    processes = []
    for share in (jobs[first::most] for first in range(most)):
        with suppress(OSError):  # where no more processes are to be had, it is compiled where it is wanted
            processes += [_started({"jobs": share, "target": target})] if share else []
    triton_key()  # a digest of half a gigabyte, which Triton keeps
    for process in processes:
        try:
            process.wait(_HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def specializations(terms: Terms, dtype: torch.dtype, device: torch.device) -> list[tuple[str, str, str]]:
    """Module, name, and what Triton would compile of it, as it writes that down; nothing is compiled."""
    found: dict[tuple[str, str, str], None] = {}
    own, others = threading.get_ident(), knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **more: Any) -> Any:
        if threading.get_ident() != own:  # what another thread launches meanwhile is to be compiled
            return None if others is None else others(fn=fn, compile=compile, **more)
        found[fn.module, fn.name, compile["specialization_data"]] = None
        return True

    weights = stand_ins(terms, dtype, device)
    knobs.runtime.jit_cache_hook = note
    try:
        for choice, tokens in variants(terms, dtype):
            compile_only(weights.router.new_empty(tokens, terms.hidden), weights, terms, choice)
    finally:
        knobs.runtime.jit_cache_hook = others
    return list(found)


def _started(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps({"path": [_ROOT, *sys.path], "do": job}).encode())
    return process
