"""Timing on a GPU in CUDA graphs, so that the host's time is left out."""

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


def timed(call: Call) -> float:
    """Microseconds of one call, its work on the device included."""
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def timed_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    return timed(graph.replay)


def graph_us(calls: Sequence[Call], *, replays: int = 30, warm_up: int = 3) -> float:
    """Median microseconds of one call out of a graph of all of them.

    Each call should have weights of its own, as a model's layers do: then every replay finds them in memory, not in
    the L2 cache. The launch of the graph is divided by the number of calls like everything else.
    """
    graph = record(calls)
    times = [timed_replay(graph) for _ in range(warm_up + replays)]
    return statistics.median(times[warm_up:]) / len(calls)


def graphs_us_in_turns(*alternatives: Sequence[Call], rounds: int = 15) -> tuple[float, ...]:
    """The same of alternatives, replayed in turns, so that a clock that changes meets all of them alike."""
    graphs = [record(calls) for calls in alternatives]
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds + 2):
        for graph, found in zip(graphs, times, strict=True):
            took = timed_replay(graph)
            if turn >= 2:
                found.append(took)
    return tuple(statistics.median(found) / len(calls) for found, calls in zip(times, alternatives, strict=True))
