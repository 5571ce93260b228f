"""Runs a function in a process of its own, in which no engine ever was.

On a CPU it is forked from one that has done nothing but import vLLM, as that takes longer than an engine's start. Where
there is a GPU it starts anew: processes that an engine forks in turn can't use CUDA there.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

_FORKED = not torch.cuda.is_available()
_PROCESSES = multiprocessing.get_context("forkserver" if _FORKED else "spawn")
_PROCESSES.set_forkserver_preload(
    [
        "compressed_tensors",
        "torch._inductor.compile_fx",
        "transformers.models.auto.modeling_auto",
        "vllm.entrypoints.llm",
        "vllm.model_executor.layers.fused_moe",
        "vllm.model_executor.model_loader",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
    ]
)


def run_apart(function: Callable[..., None], *args: Any, env: Mapping[str, str], log: Path, seconds: float) -> None:
    """Calls ``function``, of an importable module, with ``args`` under ``env``; what it prints goes to ``log``.

    Raises AssertionError, with what was printed, if it doesn't end well in ``seconds``. What it started ends with it.
    """
    if _FORKED:
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # which is read once, when libraries are loaded
            forkserver.ensure_running()
    child = _PROCESSES.Process(target=_begin, args=(function, args, dict(env), log))
    child.start()
    assert child.pid is not None
    try:
        child.join(seconds)
        ended = child.exitcode if child.exitcode is not None else f"nothing in {seconds} s"
    finally:
        with suppress(ProcessLookupError):  # workers that hang don't end by themselves
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
    if ended != 0:
        raise AssertionError(f"the process ended with {ended}\n{log.read_text(encoding='utf-8')}")


def _begin(function: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], log: Path) -> None:
    os.setsid()
    with log.open("wb") as file:
        for output in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), output.fileno())
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    # What was imported stays, so it isn't walked whenever an engine ends.
    gc.freeze()
    gc.set_threshold(100_000)
    function(*args)
