"""Which path and which tile sizes serve a number of tokens: a table in data, written by ``benchmarks/tune.py``.

``configs/<shape>.json`` holds the rows of one shape, measured on the device that it names; weights in e4m3 have rows of
their own. A number of tokens is served by the row of the largest number not above it. Shapes without a table take the
rows of ``default.json``. What ``moe-surgery tune`` found on the GPU that is used comes before all of them. Where vLLM's
experts were timed too (``vllm_us``) and take less, an engine uses those (``engine/model/crossover.py``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.arguments import Terms

FOLDER = Path(__file__).parent / "configs"
DEFAULT = "default"
NOISE = 1.02
"""Times that differ by less are no reason to cross over."""

Tiles = dict[str, int]


@dataclass(frozen=True, eq=False)
class Choice:
    """A path and, for each of its three products, tile sizes with Triton's ``num_warps`` and ``num_stages``.

    ``slower`` says that vLLM's experts were measured to be faster there.
    """

    tokens: int
    path: Literal["pairs", "grouped"]
    logits: Tiles
    gate_up: Tiles
    down: Tiles
    slower: bool = False

    @classmethod
    def of(cls, row: dict[str, Any], slower: bool = False) -> Choice:
        return cls(row["tokens"], row["path"], row["logits"], row["gate_up"], row["down"], slower)


def shape_name(terms: Terms) -> str:
    """The name of a shape's table, such as ``H1024-E128-I384-K6-M2``, or the same with ``-e4m3`` of scaled weights."""
    sizes = f"H{terms.hidden}-E{terms.experts}-I{terms.width}-K{terms.top_k}-M{terms.slices}"
    return f"{sizes}-e4m3" if terms.scaled else sizes


def own_folder(device: str) -> Path:
    """Where the tables are that the user had made for a GPU of this name."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moe-surgery" / "kernels" / re.sub(r"[^A-Za-z0-9.-]+", "-", device)


@cache
def table(name: str) -> tuple[Choice, ...]:
    """The rows of a table, fewest tokens first; empty if there is none.

    Raises :class:`UsageError` if the user's own isn't one.
    """
    folders = [own_folder(torch.cuda.get_device_name())] if torch.cuda.is_available() else []
    for folder in (*folders, FOLDER):
        path = folder / f"{name}.json"
        if path.is_file():
            return read_table(path)
    return ()


def read_table(path: Path) -> tuple[Choice, ...]:
    """The rows of a file. Raises :class:`UsageError` if they serve not every number of tokens from 1."""
    try:
        rows = tuple(_choices(json.loads(path.read_text(encoding="utf-8"))["rows"]))
        numbers = [row.tokens for row in rows]
        if numbers[:1] != [1] or numbers != sorted(numbers):
            raise ValueError(f"rows for {numbers} tokens")
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "remove it, or run moe-surgery tune again"
        raise UsageError(f"{path} is no table of tiles ({error!r}); {advice}") from error
    return rows


def _choices(rows: Sequence[dict[str, Any]]) -> Iterator[Choice]:
    slower = False
    for row in rows:
        if "vllm_us" in row:  # a row that wasn't timed against vLLM is as the one before it
            slower = row["vllm_us"] * NOISE < row["us"]
        yield Choice.of(row, slower)


@cache
def choose(terms: Terms, tokens: int, dtype: torch.dtype) -> Choice:
    """The row that serves ``tokens``."""
    return serving(rows_for(terms, dtype), tokens)


def rows_for(terms: Terms, dtype: torch.dtype) -> tuple[Choice, ...]:
    """The table of a block of ``dtype``. Those of shapes are for two-byte dtypes; float32 takes the default's tiles."""
    default = f"{DEFAULT}-{8 if terms.scaled else 8 * dtype.itemsize}"
    return (table(shape_name(terms)) if dtype.itemsize == 2 else ()) or table(default)


def serving(rows: Sequence[Choice], tokens: int) -> Choice:
    """The row of the largest number of tokens not above ``tokens``."""
    return [row for row in rows if row.tokens <= tokens][-1]


@cache
def router_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Those of the logits of ``tokens``, where the router is an operator of its own."""
    return serving(table(f"{DEFAULT}-{8 * dtype.itemsize}"), tokens).logits
