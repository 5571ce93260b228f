"""Timing on a GPU: what the library has for CUDA graphs, single calls as they come, and the memory's rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_surgery.timing.graphs import Call, graph_us, record, timed, timed_replay

__all__ = ["Call", "graph_us", "memory_rate", "record", "timed_eager", "timed_replay"]


def timed_eager(calls: Sequence[Call]) -> float:
    """Microseconds of all calls one after another, the host's time included where it is the longer."""

    def every() -> None:
        for call in calls:
            call()

    return timed(every)


def memory_rate() -> float:
    """Bytes per second that this device's memory gives: of a large copy or of a large sum, whichever is the faster."""
    source = torch.randn(1 << 29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = graph_us([lambda: target.copy_(source)] * 4, replays=10)
    read = graph_us([lambda: source.sum()] * 4, replays=10)
    return max(2 * source.nbytes / copied, source.nbytes / read) * 1e6
