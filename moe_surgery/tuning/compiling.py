"""Compiling candidates ahead, in processes side by side: it fills Triton's cache for the process that measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels import launch
from moe_surgery.kernels.arguments import WIDE_ROWS, Scales, Terms, Weights
from moe_surgery.kernels.choice import Choice
from moe_surgery.tuning.candidates import candidates


def compilers(workers: int) -> ProcessPoolExecutor:
    """Processes that compile."""
    return ProcessPoolExecutor(workers, get_context("spawn"))


def begin_compiling(
    pool: ProcessPoolExecutor, workers: int, terms: Terms, dtype: str, numbers: Sequence[int]
) -> list[Future[None]]:
    """Begin to compile every candidate for any of these numbers of tokens."""
    jobs: dict[str, tuple[int, Choice]] = {}
    for tokens in numbers:
        for path, products in candidates(terms, tokens):
            for place in range(max(map(len, products.values()))):
                tiles = {name: listed[min(place, len(listed) - 1)] for name, listed in products.items()}
                choice = Choice.of({"tokens": tokens, "path": path, **tiles})
                few = 2 if path == "pairs" else 9 if tokens <= WIDE_ROWS else WIDE_ROWS + 1
                jobs.setdefault(json.dumps([path, tiles, few]), (few, choice))
    waiting = []
    for few in {few for few, _ in jobs.values()}:
        rows = [asdict(choice) for number, choice in jobs.values() if number == few]
        shares = [rows[first::workers] for first in range(workers)]
        waiting += [pool.submit(_compile, terms, dtype, few, share) for share in shares if share]
    return waiting


def _compile(terms: Terms, dtype: str, tokens: int, rows: Sequence[dict[str, Any]]) -> None:
    """Compile each row's kernels. Nothing is launched, and the weights take no memory."""
    like: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, dtype)}
    experts, slices, hidden, width = terms.experts, terms.slices, terms.hidden, terms.width
    rows13 = (2 if terms.up else 1) * width

    def of(*shape: int) -> Tensor:
        return torch.empty([1] * len(shape), **like).expand(shape)

    def expert(*shape: int) -> Tensor:
        return of(*shape).to(torch.float8_e4m3fn) if terms.scaled else of(*shape)

    factors = torch.empty(1, device="cuda")
    weights = Weights(
        of(experts, hidden),
        expert(experts, rows13, hidden),
        expert(experts, hidden, width),
        of(1, hidden) if terms.gated else None,
        expert(rows13 // width * slices * width, hidden) if slices else None,
        None,
        expert(hidden, slices * width) if slices else None,
        of(experts, rows13) if terms.biases else None,
        of(experts, hidden) if terms.biases else None,
        Scales(factors, factors) if terms.scaled else None,
    )
    x = torch.empty(tokens, hidden, **like)
    for row in rows:
        try:
            launch.compile_only(x, weights, terms, Choice.of(row))
        except Exception as error:  # told where it is measured
            del error
