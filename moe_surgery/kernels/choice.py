"""Which path and which tile sizes serve a number of tokens: a table in data, written by ``benchmarks/tune.py``.

``configs/<shape>.json`` holds the rows of one shape, measured on the device that it names; weights in e4m3 have rows of
their own. A number of tokens is served by the row of the largest number not above it. Shapes without a table take the
rows of ``default-16.json``, and float32 those of ``default-32.json``, by how many tokens an expert gets; for e4m3 those
of the shape most like it. What ``moe-surgery tune`` found on the GPU that is used comes before all of them. Where
vLLM's experts were timed too (``vllm_us``) and take less, an engine uses those (``engine/model/crossover.py``).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.arguments import BLOCK, Terms, next_power

FOLDER = Path(__file__).parent / "configs"
DEFAULT = "default"
NOISE = 1.02
"""Times that differ by less are no reason to cross over."""

_DEFAULT_EXPERTS = 128 / 6
"""Experts for each one that a token visits, in the shape that the default's numbers of tokens are for."""
_SCALED = "-e4m3"

Tiles = dict[str, int]


@dataclass(frozen=True, eq=False)
class Choice:
    """A path and, for each of its three products, tile sizes with Triton's ``num_warps`` and ``num_stages``.

    ``add`` has those of the last kernel of the grouped path where that computes the shared expert's down projection
    too, and is empty where it doesn't. Where ``logits`` say nothing of rows (BR), the programs that compute them choose
    experts at once. ``slower`` says that vLLM's experts were measured to be faster there.
    """

    tokens: int
    path: Literal["pairs", "grouped"]
    logits: Tiles
    gate_up: Tiles
    down: Tiles
    slower: bool = False
    add: Tiles = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any], slower: bool = False) -> Choice:
        return cls(row["tokens"], row["path"], row["logits"], row["gate_up"], row["down"], slower, row.get("add", {}))


def shape_name(terms: Terms) -> str:
    """The name of a shape's table, such as ``H1024-E128-I384-K6-M2``, or the same with ``-e4m3`` of scaled weights."""
    sizes = f"H{terms.hidden}-E{terms.experts}-I{terms.width}-K{terms.top_k}-M{terms.slices}"
    return sizes + _SCALED if terms.scaled else sizes


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
    """The table of a block. Those of shapes are for two-byte dtypes and for e4m3; float32 takes the default's tiles."""
    named = table(shape_name(terms)) if dtype.itemsize == 2 or terms.scaled else ()
    rows = named or (nearest(terms) if terms.scaled else defaults(terms, dtype))
    return _ungrouped(rows) if terms.by_row else rows


@cache
def timed_against_vllm(terms: Terms, dtype: torch.dtype, device: str) -> bool:
    """Whether the table of a block's shape has vLLM's times beside these kernels', taken on a GPU of that name.

    What chooses the experts was timed with them, so it isn't known of those that are given.
    """
    path = FOLDER / f"{shape_name(terms)}.json"
    if dtype.itemsize != 2 or terms.given or not path.is_file():
        return False
    data = json.loads(path.read_text(encoding="utf-8"))
    return bool(data["device"] == device and any("vllm_us" in row for row in data["rows"]))


def _ungrouped(rows: Sequence[Choice]) -> tuple[Choice, ...]:
    """The rows for few tokens, where there are no kernels for more: it is slower with these."""
    few = [row for row in rows if row.path == "pairs"]
    first = next(row for row in rows if row.path == "grouped")
    return (*few, replace(few[-1], tokens=first.tokens, slower=True))


@cache
def defaults(terms: Terms, dtype: torch.dtype) -> tuple[Choice, ...]:
    """The default's rows, each from as many tokens on as give one of these experts what its own number gives theirs.

    How many rows a tile should have depends on that; from when on tokens are grouped doesn't.
    """
    rows = table(f"{DEFAULT}-{8 * dtype.itemsize}")
    first = next(place for place, row in enumerate(rows) if row.path == "grouped")
    more = terms.experts / terms.top_k / _DEFAULT_EXPERTS
    found = {row.tokens: row for row in rows[: first + 1]}
    for row in rows[first + 1 :]:
        tokens = max(math.ceil(row.tokens * more), rows[first].tokens)
        found[tokens] = replace(row, tokens=tokens)
    return tuple(found.values())


@cache
def nearest(terms: Terms) -> tuple[Choice, ...]:
    """The rows of the shape in e4m3 most like this one of those that come with the library.

    Tiles depend on how many tokens an expert gets, and on how far its two products reach: so shapes are compared by
    the experts for each one chosen and by both widths, and a row is taken for as many tokens as give an expert as many.
    Where vLLM's layer was faster it is taken for faster here. With scales by row there are rows for few tokens alone,
    which don't depend on what an expert gets.
    """
    found = {path.stem: _sizes(path.stem) for path in sorted(FOLDER.glob(f"H*{_SCALED}.json"))}
    own = _sizes(shape_name(terms))
    name = min(found, key=lambda each: _unlikeness(own, found[each]))
    like = found[name]
    more = 1.0 if terms.by_row else own["E"] / own["K"] / (like["E"] / like["K"])
    wider = next_power(own["K"] + own["M"]) // next_power(like["K"] + like["M"])
    rows: dict[int, Choice] = {}
    for row in read_table(FOLDER / f"{name}.json"):
        tokens = max(1, math.ceil(row.tokens * more)) if row.tokens > 1 else 1
        down = row.down
        if row.path == "pairs" and wider > 1:  # a program holds a tile for each of a token's slots
            down = {**down, "BK": max(down["BK"] // wider, BLOCK)}
        logits = row.logits
        if "BR" not in logits and next_power(own["E"]) > next_power(like["E"]):  # a program would have all experts
            logits = router_tiles(tokens, torch.bfloat16)
        rows[tokens] = replace(row, tokens=tokens, logits=logits, down=down)
    return tuple(rows.values())


def _sizes(name: str) -> dict[str, int]:
    """What a shape's name says: hidden H, experts E, width I, chosen K and slices M."""
    return {part[0]: int(part[1:]) for part in name.removesuffix(_SCALED).split("-")}


def _unlikeness(one: dict[str, int], two: dict[str, int]) -> float:
    apart = one["E"] / one["K"] / (two["E"] / two["K"]), one["H"] / two["H"], one["I"] / two["I"]
    return sum(abs(math.log(ratio)) for ratio in apart)


def serving(rows: Sequence[Choice], tokens: int) -> Choice:
    """The row of the largest number of tokens not above ``tokens``."""
    return [row for row in rows if row.tokens <= tokens][-1]


@cache
def router_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Those of the logits of ``tokens``, where the router is an operator of its own."""
    return serving(table(f"{DEFAULT}-{8 * dtype.itemsize}"), tokens).logits
