"""Launching the kernels: scratch, grids, and the way from a :class:`Choice` to compile-time arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels import grouped, pairs
from moe_surgery.kernels.arguments import Terms, Weights
from moe_surgery.kernels.choice import Choice

ALIGNMENT = 16
"""Bytes. Compiled kernels take pointers and offsets for multiples of it where the first ones they got were."""


class Kernel:
    """A Triton function with its compile-time arguments, which follow the others in its signature.

    Triton looks up the compiled kernel anew at every call, from all arguments. That takes most of the time of a launch,
    and with ``aligned`` arguments of the same dtypes it always finds the same one; so it is asked once.
    """

    def __init__(self, function: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.last = tuple(constants[name] for name in function.arg_names if name in constants)
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], aligned: bool, *arguments: object) -> None:
        if self.compiled is not None and aligned:
            self.compiled[grid](*arguments, *self.last)
            return
        compiled = self.function[grid](*arguments, **self.constants, **self.options)
        if aligned:
            self.compiled = compiled


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one path, in order, for one block on one device."""

    logits: Kernel
    gate_up: Kernel
    down: Kernel
    route: Kernel | None = None
    add: Kernel | None = None


def run(x: Tensor, weights: Weights, terms: Terms, choice: Choice) -> Tensor:
    """The block's output [T, H] for tokens ``x`` [T, H], contiguous, in the weights' dtype, with T > 0.

    Only launches: nothing is copied to the host, so that a CUDA graph can record it.
    """
    kernels = _kernels(terms, choice, x.device, x.dtype, terms.rows_dtype(len(x), x.dtype))
    shared13, shared2 = weights.offsets()
    aligned = (x.data_ptr() | shared13 | shared2) % ALIGNMENT == 0
    launch = _pairs if choice.path == "pairs" else _grouped
    return launch(x, weights, terms, choice, kernels, aligned, shared13, shared2)


def _pairs(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, aligned: bool, *shared: int
) -> Tensor:
    tokens = len(x)
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=x.device)
    act = torch.empty(tokens * terms.pairs, terms.width, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    grid = (_tiles(terms.rows, choice.logits["BR"]), tokens, 1)
    kernels.logits(grid, aligned, x, weights.router, logits, logits)
    grid = (tokens * terms.pairs, _tiles(terms.width, choice.gate_up["BI"]), 1)
    kernels.gate_up(grid, aligned, x, logits, weights.w13, shared[0], act, tokens)
    grid = (tokens, _tiles(terms.hidden, choice.down["BH"]), 1)
    kernels.down(grid, aligned, act, logits, weights.w2, shared[1], out, terms.scale, terms.shared_scale)
    return out


def _grouped(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, aligned: bool, *shared: int
) -> Tensor:
    tokens, visits = len(x), len(x) * terms.pairs
    one, two, three = choice.logits, choice.gate_up, choice.down
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=x.device)
    routing = torch.empty(visits, dtype=torch.float32, device=x.device)
    lists = torch.empty(terms.experts, tokens, dtype=torch.int32, device=x.device)
    counts = torch.empty(terms.experts, dtype=torch.int32, device=x.device)
    act = torch.empty(visits, terms.width, dtype=x.dtype, device=x.device)
    rows = torch.empty(visits, terms.hidden, dtype=terms.rows_dtype(tokens, x.dtype), device=x.device)
    out = torch.empty_like(x)
    assert kernels.route is not None and kernels.add is not None
    if "BT" in one:
        grid = (_tiles(terms.rows, one["BR"]), _tiles(tokens, one["BT"]), 1)
        kernels.logits(grid, aligned, x, weights.router, logits, counts, tokens)
    else:
        kernels.logits((_tiles(terms.rows, one["BR"]), tokens, 1), aligned, x, weights.router, logits, counts)
    kernels.route((tokens, 1, 1), aligned, logits, routing, counts, lists, tokens, terms.scale, terms.shared_scale)
    grid = (_tiles(terms.width, two["BI"]) * row_blocks(terms, tokens, two["BM"]), 1, 1)
    kernels.gate_up(grid, aligned, x, weights.w13, shared[0], act, counts, lists, tokens)
    grid = (_tiles(terms.hidden, three["BH"]) * row_blocks(terms, tokens, three["BM"]), 1, 1)
    kernels.down(grid, aligned, act, weights.w2, shared[1], routing, rows, counts, lists, tokens)
    kernels.add((tokens, _tiles(terms.hidden, _columns(terms)), 1), aligned, rows, out)
    return out


def row_blocks(terms: Terms, tokens: int, size: int) -> int:
    """No fewer blocks of ``size`` rows than any routing of ``tokens`` tokens fills."""
    visits = tokens * terms.top_k
    return visits // size + min(terms.experts, visits) + terms.slices * _tiles(tokens, size)


@lru_cache(maxsize=1024)
def _kernels(terms: Terms, choice: Choice, device: torch.device, dtype: torch.dtype, rows: torch.dtype) -> Kernels:
    """The kernels of ``choice``'s path. Each key has its own, since what they compile to depends on the dtypes."""
    ranked = _power(terms.experts)
    dependent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    options = {"launch_pdl": True} if dependent else {}
    sizes = {"E": terms.experts, "K": terms.top_k, "M": terms.slices, "H": terms.hidden, "I": terms.width}
    known = {
        **sizes, "R": terms.rows, "P": _power(terms.pairs), "BE": ranked, "ACT": terms.activation,
        "SIGMOID": terms.sigmoid, "BY_SIGMOID": terms.by_sigmoid, "RENORMALIZE": terms.renormalize,
        "GATED": terms.gated, "NATIVE": terms.native,
        "CLEAR": ranked if choice.path == "grouped" else 0, "PDL": dependent,
    }  # fmt: skip

    def kernel(function: Any, **tiles: int) -> Kernel:
        chosen = {**known, **tiles}
        constants = {name: chosen[name] for name in function.arg_names if name in chosen}
        launched: dict[str, Any] = {name: tiles[name] for name in ("num_warps", "num_stages") if name in tiles}
        return Kernel(function, constants, {**launched, **options})

    one, two, three = choice.logits, choice.gate_up, choice.down
    if choice.path == "pairs":
        return Kernels(
            kernel(pairs.pair_logits, **one), kernel(pairs.pair_gate_up, **two), kernel(pairs.pair_down, **three)
        )
    logits: Callable[..., Any] = grouped.group_logits if "BT" in one else pairs.pair_logits
    return Kernels(
        kernel(logits, **one),
        kernel(grouped.group_gate_up, **two),
        kernel(grouped.group_down, **three),
        kernel(grouped.group_route),
        kernel(grouped.group_sum, P=terms.pairs, BH=_columns(terms)),
    )


def _columns(terms: Terms) -> int:
    """Columns that a program of ``group_sum`` adds."""
    return min(_power(terms.hidden), 1024)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
