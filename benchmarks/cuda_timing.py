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


def graph_us(calls: Sequence[Call], *, replays: int = 30, warm_up: int = 3) -> float:
    """Median microseconds of one call out of a graph of all of them.

    Each call should have weights of its own, as a model's layers do: then every replay finds them in memory, not in
    the L2 cache. The launch of the graph is divided by the number of calls like everything else.
    """
    graph = record(calls)
    for _ in range(warm_up):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def eager_us(calls: Sequence[Call], *, rounds: int = 20, warm_up: int = 3) -> float:
    """Median microseconds of one call out of a stack of them, called one after another without a graph."""
    times = []
    for turn in range(warm_up + rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        if turn >= warm_up:
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes per second that a large copy reads and writes on this device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = graph_us([lambda: target.copy_(source)] * 4, replays=10)
    return 2 * source.numel() / us * 1e6
