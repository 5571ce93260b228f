"""What a process does that compiles ahead (:mod:`moe_surgery.kernels.ahead`). It imports no torch and needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class _Elsewhere:
    """In the place of Triton's driver: a GPU that isn't asked for anything but what it is."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_all(jobs: Iterable[tuple[str, str, str]], target: dict[str, Any]) -> None:
    """Fill Triton's cache with each job: module and name of a function of Triton's, and its specialisation."""
    driver.set_active(_Elsewhere(GPUTarget(**target)))
    for module, name, data in jobs:
        with suppress(Exception):  # what doesn't compile is told where it is called
            getattr(import_module(module), name).preload(data)
