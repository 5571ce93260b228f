"""Timing on a GPU: CUDA graphs of a whole stack of layers, and single calls as they come."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def record(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of all calls in turn, warmed up before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def timed_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    return _timed(graph.replay)


def timed_eager(calls: Sequence[Call]) -> float:
    """Microseconds of all calls one after another, the host's time included where it is the longer."""

    def every() -> None:
        for call in calls:
            call()

    return _timed(every)


def graph_us(calls: Sequence[Call], *, replays: int = 30, warm_up: int = 3) -> float:
    """Median microseconds of one call out of a graph of all of them.

    Each call should have weights of its own, as a model's layers do: then every replay finds them in memory, not in
    the L2 cache. The launch of the graph is divided by the number of calls like everything else.
    """
    graph = record(calls)
    times = [timed_replay(graph) for _ in range(warm_up + replays)]
    return statistics.median(times[warm_up:]) / len(calls)


def memory_rate() -> float:
    """Bytes per second that this device's memory gives: of a large copy or of a large sum, whichever is the faster."""
    source = torch.randn(1 << 29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = graph_us([lambda: target.copy_(source)] * 4, replays=10)
    read = graph_us([lambda: source.sum()] * 4, replays=10)
    return max(2 * source.nbytes / copied, source.nbytes / read) * 1e6


def _timed(call: Call) -> float:
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
