"""What a process does that compiles ahead (:mod:`moe_surgery.kernels.ahead`). It imports no torch and needs no GPU."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib import import_module

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import triton_key


class _Elsewhere:
    """In the place of Triton's driver: a GPU that isn't asked for anything but what it is."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def serve() -> None:
    """Fill Triton's cache with each job that a line of stdin tells, after one of the target; a line answers each.

    A job is the module and the name of a function of Triton's, and its specialisation.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is no answer
        triton_key()  # takes as long as some kernels, and jobs may be long in coming
        driver.set_active(_Elsewhere(GPUTarget(**json.loads(sys.stdin.readline()))))
        for line in sys.stdin:
            module, name, data = json.loads(line)
            with suppress(Exception):  # what doesn't compile is told where it is called
                getattr(import_module(module), name).preload(data)
            print(file=out, flush=True)
