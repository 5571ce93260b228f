"""Compiling ahead: all kernels that any number of tokens may need, side by side, so that no request waits for one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from triton.runtime._async_compile import AsyncCompileMode

from moe_surgery.kernels.arguments import WIDE_ROWS, Terms, Weights
from moe_surgery.kernels.choice import Choice, choose, rows_for
from moe_surgery.kernels.launch import compile_only


def warm(weights: Weights, terms: Terms, numbers: Sequence[int] | None = None) -> None:
    """Compile every kernel for ``terms`` on the weights' device, or find it in Triton's cache; nothing is launched.

    With ``numbers`` of tokens, those that they need.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        for choice, tokens in variants(terms, weights.router.dtype, numbers):
            compile_only(weights.router.new_empty(tokens, terms.hidden), weights, terms, choice)


def variants(terms: Terms, dtype: torch.dtype, numbers: Sequence[int] | None = None) -> Iterator[tuple[Choice, int]]:
    """What serves these ``numbers`` of tokens, each with its number.

    Without, every row of the table with a number of tokens for each dtype of experts' outputs that it may meet.
    """
    if numbers is not None:
        yield from ((choose(terms, tokens, dtype), tokens) for tokens in numbers)
        return
    rows = rows_for(terms, dtype)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        if row.tokens <= WIDE_ROWS:
            yield row, 2
        if after is None or after.tokens > WIDE_ROWS + 1:
            yield row, WIDE_ROWS + 1
