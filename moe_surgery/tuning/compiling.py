"""Compiling candidates ahead, in processes side by side: it fills Triton's cache for the process that measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch

from moe_surgery.kernels import launch
from moe_surgery.kernels.arguments import WIDE_ROWS, Terms, stand_ins
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
    weights = stand_ins(terms, getattr(torch, dtype), torch.device("cuda"))
    x = weights.router.new_empty(tokens, terms.hidden)
    for row in rows:
        try:
            launch.compile_only(x, weights, terms, Choice.of(row))
        except Exception as error:  # told where it is measured
            del error
