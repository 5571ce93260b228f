"""Launching the kernels: scratch, grids, and the way from a :class:`Choice` to compile-time arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels import grouped, grouping, pairs
from moe_surgery.kernels.arguments import BLOCK, Offsets, Routed, Terms, Weights, next_power, tiles_for
from moe_surgery.kernels.choice import Choice, Tiles
from moe_surgery.kernels.compiled import Kernel, Unlaunched, stream_for

_EXPERTS_PER_WARP = 512
_TURNS, _MANY_TILES = 16, 40


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one path, in order, for one block on one device."""

    gate_up: Kernel
    down: Kernel
    logits: Kernel | None = None
    route: Kernel | None = None
    add: Kernel | None = None
    count: Kernel | None = None
    enter: Kernel | None = None
    inputs: Kernel | None = None
    clear: Kernel | None = None

    def unlaunched(self) -> Kernels:
        return Kernels(*(None if each is None else Unlaunched(each) for each in vars(self).values()))  # type: ignore[arg-type]


def run(x: Tensor, weights: Weights, terms: Terms, choice: Choice, routed: Routed | None = None) -> Tensor:
    """The block's output [T, H] for tokens ``x`` [T, H], contiguous, in the router's dtype, with T > 0.

    ``routed`` has the chosen experts where the terms say that they are given.

    Only launches: nothing is copied to the host, so that a CUDA graph can record it.
    """
    kernels = _kernels(terms, choice, x.device, x.dtype, terms.rows_dtype(x.shape[0], x.dtype))
    return _run(x, weights, terms, choice, kernels, routed)


def compile_only(x: Tensor, weights: Weights, terms: Terms, choice: Choice) -> None:
    """Have the kernels compiled that :func:`run` would launch."""
    kernels = _kernels(terms, choice, x.device, x.dtype, terms.rows_dtype(len(x), x.dtype))
    routed = None
    if terms.given:
        ids = torch.empty(len(x), terms.top_k, dtype=torch.int32, device=x.device)
        routed = Routed(ids, torch.empty(len(x), terms.pairs, dtype=torch.float32, device=x.device))
    _run(x, weights, terms, choice, kernels.unlaunched(), routed)


def _run(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, routed: Routed | None = None
) -> Tensor:
    at = weights.offsets()
    places = x.data_ptr() | at.gate | at.w13 | at.up | at.w2
    for more in (weights.w13_bias, weights.w2_bias, *(weights.scales or ())[:2]):
        places |= 0 if more is None else more.data_ptr()
    launch = _pairs if choice.path == "pairs" else _grouped
    return launch(x, weights, terms, choice, kernels, stream_for(x, places), at, routed)


def _pairs(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, stream: int | None, at: Offsets,
    routed: Routed | None,
) -> Tensor:  # fmt: skip
    tokens, w = x.shape[0], weights
    scales = (x, x) if w.scales is None else w.scales[:2]
    # On its way to weights in e4m3 it is rounded by the kernel that reads it, once.
    dtype = torch.float32 if terms.scaled else x.dtype
    act = torch.empty(tokens * terms.pairs, terms.width, dtype=dtype, device=x.device)
    out = torch.empty_like(x)
    if routed is None:
        assert kernels.logits is not None
        chosen = given = torch.empty(tokens, terms.rows, dtype=torch.float32, device=x.device)
        grid = (tiles_for(terms.rows, choice.logits["BR"]), tokens, 1)
        kernels.logits(grid, stream, x, w.router, at.gate, chosen, chosen)
    else:
        chosen, given = routed
    grid = (tokens * terms.pairs, tiles_for(terms.width, choice.gate_up["BI"]), 1)
    kernels.gate_up(
        grid, stream, x, chosen, given, w.w13, scales[0], _or(w.w13_bias, x), at.w13, at.up, at.scales_w13,
        at.scales_up, act, tokens,
    )  # fmt: skip
    grid = (tokens, tiles_for(terms.hidden, choice.down["BH"]), 1)
    kernels.down(
        grid, stream, act, chosen, given, w.w2, scales[1], _or(w.w2_bias, x), at.w2, at.scales_w2, out, terms.scale,
        terms.shared_scale,
    )  # fmt: skip
    return out


def _grouped(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, stream: int | None, at: Offsets,
    routed: Routed | None,
) -> Tensor:  # fmt: skip
    tokens, visits, w = x.shape[0], x.shape[0] * terms.pairs, weights
    two, three = choice.gate_up, choice.down
    scales = (x, x) if w.scales is None else w.scales[:2]
    act = torch.empty(visits, terms.width, dtype=w.w13.dtype, device=x.device)
    parts = factors = act_factors = x
    if kernels.inputs is not None:
        parts, factors = torch.empty_like(x, dtype=w.w13.dtype), _factors(x, tokens, terms.hidden)
        act_factors = _factors(x, visits, terms.width)
        kernels.inputs((tokens, tiles_for(terms.hidden, _columns(terms)), 1), stream, x, parts, factors)
    rows = torch.empty(visits, terms.hidden, dtype=terms.rows_dtype(tokens, x.dtype), device=x.device)
    out = torch.empty_like(x)
    assert kernels.add is not None
    if routed is None:
        routing, counts, lists, blocks = _route(x, weights, terms, choice, kernels, stream, at)
        ids = counts
    else:
        ids, routing = routed
        counts, lists = _enter(ids, terms, kernels, stream)
        blocks = counts, counts
    grid = (tiles_for(terms.width, two["BI"]) * row_blocks(terms, tokens, two["BM"]), 1, 1)
    kernels.gate_up(
        grid, stream, x, parts, factors, routing, w.w13, scales[0], _or(w.w13_bias, x), at.w13, at.up, at.scales_w13,
        at.scales_up, act, act_factors, counts, lists, blocks[0], tokens,
    )  # fmt: skip
    slices = _slices_below(terms, choice)
    grid = (tiles_for(terms.hidden, three["BH"]) * row_blocks(terms, tokens, three["BM"], slices), 1, 1)
    kernels.down(
        grid, stream, act, act_factors, w.w2, scales[1], _or(w.w2_bias, x), at.w2, at.scales_w2, routing, rows,
        counts, lists, blocks[1], tokens, slices,
    )  # fmt: skip
    if slices == terms.slices:
        kernels.add((tokens, tiles_for(terms.hidden, _columns(terms)), 1), stream, rows, ids, out)
    else:
        grid = (tiles_for(tokens, choice.add["BM"]) * tiles_for(terms.hidden, choice.add["BH"]), 1, 1)
        kernels.add(grid, stream, act, w.w2, at.w2, routing, rows, ids, out, tokens)
    return out


def _route(
    x: Tensor, weights: Weights, terms: Terms, choice: Choice, kernels: Kernels, stream: int | None, at: Offsets
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Routing weights [T * (K + M)], experts' counts [E], their lists of pairs [E, T], and both products' blocks."""
    tokens, one, device = x.shape[0], choice.logits, x.device
    routing = torch.empty(tokens * terms.pairs, dtype=torch.float32, device=device)
    lists = torch.empty(terms.experts, tokens, dtype=torch.int32, device=device)
    counts = torch.empty(terms.experts + 1, dtype=torch.int32, device=device)
    scales = terms.scale, terms.shared_scale
    assert kernels.logits is not None
    if kernels.clear is not None:
        up, down = (row_blocks(terms, tokens, tiles["BM"], 0) for tiles in (choice.gate_up, choice.down))
        up += up % 2  # so that the others are aligned
        blocks = torch.empty(up + down, dtype=torch.int64, device=device)
        kernels.clear((1, 1, 1), stream, counts)
        grid = (tiles_for(tokens, one["BT"]), 1, 1)
        kernels.logits(
            grid, stream, x, weights.router, at.gate, routing, counts, lists, blocks, tokens, up, down, *scales
        )
        both = blocks, blocks if choice.gate_up["BM"] == choice.down["BM"] else blocks[up:]
        return routing, counts, lists, both
    assert kernels.route is not None
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=device)
    if "BT" in one:
        grid = (tiles_for(terms.rows, one["BR"]), tiles_for(tokens, one["BT"]), 1)
        kernels.logits(grid, stream, x, weights.router, at.gate, logits, counts, tokens)
    else:
        grid = (tiles_for(terms.rows, one["BR"]), tokens, 1)
        kernels.logits(grid, stream, x, weights.router, at.gate, logits, counts)
    kernels.route((tokens, 1, 1), stream, logits, x, routing, counts, lists, tokens, *scales)
    return routing, counts, lists, (counts, counts)


def _enter(ids: Tensor, terms: Terms, kernels: Kernels, stream: int | None) -> tuple[Tensor, Tensor]:
    """Experts' counts [E] and one list of pairs [T * K] of the experts ``ids`` [T, K]."""
    assert kernels.count is not None and kernels.enter is not None
    grid = (len(ids), 1, 1)
    counts = torch.zeros(terms.experts, dtype=torch.int32, device=ids.device)
    places, lists = torch.empty_like(ids), torch.empty_like(ids)
    kernels.count(grid, stream, ids, counts, places)
    kernels.enter(grid, stream, ids, counts, places, lists)
    return counts, lists


def _factors(x: Tensor, rows: int, columns: int) -> Tensor:
    """Room for the scales of [rows, columns] activations."""
    return torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=x.device)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Kernels take no None; what they don't read may be anything."""
    return other if tensor is None else tensor


def row_blocks(terms: Terms, tokens: int, size: int, slices: int | None = None) -> int:
    """No fewer blocks of ``size`` rows than any routing of ``tokens`` tokens fills, with ``slices`` or all of them."""
    visits = tokens * terms.top_k
    slices = terms.slices if slices is None else slices
    return visits // size + min(terms.experts, visits) + slices * tiles_for(tokens, size)


def _slices_below(terms: Terms, choice: Choice) -> int:
    """How many of the shared expert's slices ``group_down`` computes: all, or none where the sum does."""
    return 0 if choice.add else terms.slices


@lru_cache(maxsize=1024)
def _kernels(terms: Terms, choice: Choice, device: torch.device, dtype: torch.dtype, rows: torch.dtype) -> Kernels:
    """The kernels of ``choice``'s path. Each key has its own, since what they compile to depends on the dtypes."""
    dependent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return kernels_of(terms, choice, dependent=dependent)


def kernels_of(terms: Terms, choice: Choice, *, dependent: bool) -> Kernels:
    """The kernels of ``choice``'s path; ``dependent`` for GPUs that overlap launches."""
    ranked = next_power(terms.experts)
    sizes = {"E": terms.experts, "K": terms.top_k, "M": terms.slices, "H": terms.hidden, "I": terms.width}
    sizes["G"] = BLOCK if terms.scaled and not terms.by_row else 0
    known = {
        **sizes, "R": terms.rows, "P": next_power(terms.pairs), "BE": ranked, "ACT": terms.activation,
        "SIGMOID": terms.sigmoid, "BY_SIGMOID": terms.by_sigmoid, "RENORMALIZE": terms.renormalize,
        "GATED": terms.gated, "NATIVE": terms.native, "CLEAR": ranked if choice.path == "grouped" else 0,
        "UP": int(terms.up), "LIMIT": terms.limit, "AFTER": terms.limit_after, "ALPHA": terms.alpha,
        "OFFSET": terms.offset, "BIAS": terms.biases, "GIVEN": terms.given, "ON_INPUT": terms.on_input,
        "BY_ROW": terms.by_row, "TOKEN": next_power(terms.hidden), "AHEAD": 1,
    }  # fmt: skip

    def kernel(function: Any, tiles: Tiles, *, first: bool = False) -> Kernel:
        """``first`` where what runs before is not ours and says nothing of when the next kernel may start."""
        return Kernel.of(function, known, tiles, overlaps=dependent and not first)

    one, two, three = choice.logits, choice.gate_up, choice.down
    if choice.path == "pairs":
        return Kernels(
            kernel(pairs.pair_gate_up, two, first=terms.given),
            kernel(pairs.pair_down, three),
            None if terms.given else kernel(pairs.pair_logits, one),
        )
    if terms.by_row:
        raise ValueError("tokens are not grouped by expert where weights have a scale for each row")
    up_turns = _turns(tiles_for(terms.width, two["BI"]), terms.slices)
    down_turns = _turns(tiles_for(terms.hidden, three["BH"]), _slices_below(terms, choice))
    at_once = not terms.given and "BR" not in one  # a program has all experts of its tokens, and chooses from logits
    products = (
        kernel(
            grouped.group_gate_up, {**two, "TURNS": up_turns, "LISTED": at_once and up_turns == 1}, first=terms.given
        ),
        kernel(grouped.group_down, {**three, "TURNS": down_turns, "LISTED": at_once and down_turns == 1}),
    )
    if _slices_below(terms, choice) == terms.slices:
        add = kernel(grouped.group_sum, {"P": terms.pairs, "BH": _columns(terms)})
    else:
        add = kernel(grouped.group_sum_shared, choice.add)
    inputs = kernel(grouped.group_inputs, {"BK": _columns(terms)}, first=terms.given) if terms.scaled else None
    if terms.given:
        slots = {"P": next_power(terms.top_k)}
        count, enter = (kernel(each, slots, first=True) for each in (grouping.group_count, grouping.group_enter))
        return Kernels(*products, add=add, count=count, enter=enter, inputs=inputs)
    if at_once:
        clear = kernel(grouping.group_clear, {"num_warps": 1})
        first = kernel(grouping.group_choose, {**one, "UP_ROWS": two["BM"], "DOWN_ROWS": three["BM"]})
        return Kernels(*products, first, add=add, inputs=inputs, clear=clear)
    logits: Callable[..., Any] = grouping.group_logits if "BT" in one else pairs.pair_logits
    choose = kernel(grouping.group_route, choosing(terms.experts))
    return Kernels(*products, kernel(logits, one), choose, add, inputs=inputs)


def _turns(tiles: int, slices: int) -> int:
    """Of how many row blocks a column's tiles are computed one after the other, where a row of a product has ``tiles``.

    A GPU computes some hundred tiles at a time. Where a row has as many, only programs of other rows share its weights,
    which were read from memory for every row. Where it has few, several rows are computed at a time anyway.
    """
    return _TURNS if max(slices, 1) * tiles > _MANY_TILES else 1


def choosing(experts: int) -> Tiles:
    """Warps of a program that chooses one token's of so many experts."""
    return {"num_warps": max(1, next_power(experts) // _EXPERTS_PER_WARP)}


def _columns(terms: Terms) -> int:
    """Columns that a program of ``group_sum`` adds, and one of ``group_inputs`` rounds."""
    return min(next_power(terms.hidden), 1024)
