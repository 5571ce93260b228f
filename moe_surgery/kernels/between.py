"""Launching what stands between the two products of a gated shared expert that vLLM's own kernels compute."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_surgery.kernels import beside
from moe_surgery.kernels.arguments import next_power, tiles_for
from moe_surgery.kernels.compiled import Kernel, stream_for

_TILES = {"BI": 256, "num_warps": 4}


def run_between(h: Tensor, x: Tensor, gate: Tensor, factor: float, activation: str) -> tuple[Tensor, Tensor]:
    """``act(gate) * up`` [T, I] of ``h`` [T, 2 I], and ``factor * sigmoid(x @ gate)`` [T, 1]; T > 0.

    ``x`` is [T, H], ``gate`` [1, H]; all are contiguous and of one dtype, which both results are of, too.
    """
    kernel = between_kernel(x.shape[1], h.shape[1] // 2, activation, x.device, x.dtype)
    tokens, width = x.shape[0], h.shape[1] // 2
    act, share = h.new_empty(tokens, width), x.new_empty(tokens, 1)
    stream = stream_for(x, h.data_ptr() | x.data_ptr() | gate.data_ptr())
    kernel((tokens, 1 + tiles_for(width, _TILES["BI"]), 1), stream, h, x, gate, act, share, factor)
    return act, share


@lru_cache(maxsize=1024)
def between_kernel(hidden: int, width: int, activation: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Each key has its own, since what it compiles to depends on the dtype."""
    known = {"H": hidden, "I": width, "BH": next_power(hidden), "ACT": activation}
    return Kernel.of(beside.mix_and_gate, known, _TILES, overlaps=False)
