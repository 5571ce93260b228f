"""A Triton function with its compile-time arguments, and how it is launched without Triton looking it up each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels.choice import Tiles

ALIGNMENT = 16
"""Bytes. Compiled kernels take pointers and offsets for multiples of it where the first ones they got were."""


class Kernel:
    """A Triton function with its compile-time arguments, which follow the others in its signature.

    Triton looks up the compiled kernel anew at every call, from all arguments. That takes most of the time of a launch,
    and with aligned arguments of the same dtypes it always finds the same one; so it is asked once, and what it found
    is run as Triton itself does, but for its profilers' hooks.
    """

    def __init__(self, function: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.last = tuple(constants[name] for name in function.arg_names if name in constants)
        self.compiled: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, function: Any, known: Mapping[str, Any], tiles: Tiles, *, overlaps: bool) -> Kernel:
        """With those of the ``known`` numbers and ``tiles`` that it takes.

        ``overlaps`` where it may start before the kernel that is launched before it ends.
        """
        chosen = {**known, **tiles, "PDL": overlaps}
        constants = {name: chosen[name] for name in function.arg_names if name in chosen}
        options: dict[str, Any] = {name: tiles[name] for name in ("num_warps", "num_stages") if name in tiles}
        return cls(function, constants, {**options, "launch_pdl": True} if overlaps else options)

    def __call__(self, grid: tuple[int, int, int], stream: int | None, *arguments: object) -> None:
        """``stream`` is what :func:`stream_for` says of the ``arguments``, which are for the current device."""
        if stream is not None and self.compiled is not None:
            run, function, metadata = self.compiled
            run(*grid, stream, function, metadata, None, None, None, *arguments, *self.last)
            return
        found = self.function[grid](*arguments, **self.constants, **self.options)
        if stream is not None:
            self.compiled = found.run, found.function, found.packed_metadata


def stream_for(x: Tensor, places: int) -> int | None:
    """The current stream of the GPU that ``x`` is on; None on a CPU, or where some of ``places`` isn't aligned.

    ``places`` are the addresses of the arguments, and offsets from them, all joined by "or".
    """
    if places % ALIGNMENT or not x.is_cuda:
        return None
    stream: int = torch._C._cuda_getCurrentRawStream(x.get_device())
    return stream


class Unlaunched(Kernel):
    """One that is compiled when it is called, and not launched."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.function, kernel.constants, kernel.options)

    def __call__(self, grid: tuple[int, int, int], stream: int | None, *arguments: object) -> None:
        self.function.warmup(*arguments, grid=grid, **self.constants, **self.options)
