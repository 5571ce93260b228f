"""How more tokens come into their experts' lists, for the products of :mod:`moe_surgery.kernels.grouped`.

    group_logits   router and shared gate for a tile of tokens; clears the experts' counts
    group_route    chooses each token's experts and enters the token in their lists

Where experts are chosen outside, ``group_count`` and ``group_enter`` take the place of both. The order within a list
depends on chance (integer atomics).

Which tile of a product a program computes, and for which tokens of the lists, is here too (``find_rows``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import choose, let_next_start, router_offset, wait


@triton.jit(do_not_specialize=["tokens"])
def group_logits(
    x, router, gate: tl.int64, logits, counts, tokens, R: tl.constexpr, E: tl.constexpr, H: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``pair_logits``, for BT tokens at once. Grid: (cdiv(R, BR), cdiv(tokens, BT))."""
    wait(PDL)
    let_next_start(PDL)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BK)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        every = tl.arange(0, BE)
        tl.store(counts + every, tl.zeros([BE], tl.int32), mask=every < E)
    starts = router_offset(rows, gate, R, E, H)[:, None]
    total = tl.zeros([BT, BR], tl.float32)
    for k in range(0, H, BK):
        inside = (k + columns < H)[None, :]
        value = tl.load(
            x + token.to(tl.int64)[:, None] * H + k + columns[None, :],
            mask=(token < tokens)[:, None] & inside,
            other=0.0,
        )
        w = tl.load(router + starts + k + columns[None, :], mask=(rows < R)[:, None] & inside, other=0.0)
        total = tl.dot(value.to(w.dtype), w.T, total, input_precision="ieee")
    if NATIVE:
        total = tl.where((rows < E)[None, :], total.to(x.dtype.element_ty).to(tl.float32), total)
    at = logits + token.to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(at, total, mask=(token < tokens)[:, None] & (rows < R)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def group_route(
    logits, x, weights, counts, lists, tokens, scale, shared_scale, R: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, BE: tl.constexpr, P: tl.constexpr, SIGMOID: tl.constexpr, BY_SIGMOID: tl.constexpr,
    NATIVE: tl.constexpr, RENORMALIZE: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``weights`` [T, K+M] by slot; each expert's ``lists`` [E, T] of pairs ``t * (K+M) + slot``. Grid: (tokens,).

    Of the tokens ``x`` only the dtype is asked for.
    """
    wait(PDL)
    let_next_start(PDL)
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * R
    slots = tl.arange(0, P)
    experts, values = choose(row, x, slots, scale, E, BE, K, SIGMOID, BY_SIGMOID, NATIVE, RENORMALIZE)
    chosen = slots < K
    pair = token * (K + M) + slots
    place = tl.atomic_add(counts + experts, 1, mask=chosen, sem="relaxed")
    tl.store(lists + experts.to(tl.int64) * tokens + place, pair, mask=chosen)
    if M > 0:
        gate = shared_scale
        if GATED:
            gate = shared_scale * tl.sigmoid(tl.load(row + E, cache_modifier=".cg"))
        values = tl.where(chosen, values, gate)
    tl.store(weights + pair, values, mask=slots < K + M)


@triton.jit
def group_count(ids, counts, places, K: tl.constexpr, P: tl.constexpr):
    """Experts' visitors ``counts`` [E], which are zero before, from ``ids`` [T, K], and each pair's place among its
    expert's. Grid: (tokens,)."""
    slots = tl.arange(0, P)
    at = tl.program_id(0).to(tl.int64) * K + slots
    experts = tl.load(ids + at, mask=slots < K, other=-1)
    place = tl.atomic_add(counts + experts, 1, mask=experts >= 0, sem="relaxed")
    tl.store(places + at, place, mask=experts >= 0)


@triton.jit
def group_enter(
    ids, counts, places, lists, E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Pairs ``t * (K+M) + slot`` into one flat list, expert after expert. Grid: (tokens,).

    An expert may have any number of a token's slots, which rows of fixed length for each expert couldn't hold.
    """
    slots = tl.arange(0, P)
    every = tl.arange(0, BE)
    token = tl.program_id(0)
    at = token.to(tl.int64) * K + slots
    experts = tl.load(ids + at, mask=slots < K, other=-1)
    count = tl.load(counts + every, mask=every < E, other=0)
    starts = tl.sum(tl.where(every[None, :] < experts[:, None], count[None, :], 0), axis=1)
    place = tl.load(places + at, mask=experts >= 0, other=0)
    tl.store(lists + starts + place, token * (K + M) + slots, mask=experts >= 0)


@triton.jit
def in_turns(place, rows, columns, TURNS: tl.constexpr):
    """Row and column of the tile at ``place`` of a product of ``rows`` times ``columns`` tiles.

    Of each TURNS rows, a column's tiles come one after the other, so that as many programs read the same weights at a
    time.
    """
    group = place // (TURNS * columns)
    size = tl.maximum(tl.minimum(rows - group * TURNS, TURNS), 1)
    place %= TURNS * columns
    return group * TURNS + place % size, place // size


@triton.jit
def shared_rows(
    tokens, program, tiles: tl.constexpr, E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """As :func:`find_rows`, for the tiles of the shared expert: all tokens, in order, for each of its slices."""
    if TURNS == 1:
        block = program // tiles
        row, piece, tile = block // M, block % M, program % tiles
    else:
        row, column = in_turns(program, (tokens + BM - 1) // BM, M * tiles, TURNS)
        piece, tile = column // tiles, column % tiles
    place = row * BM + tl.arange(0, BM)
    return E + piece, tl.where(place < tokens, place * (K + M) + K + piece, -1), tile


@triton.jit
def find_rows(
    counts, lists, tokens, program, early, tiles: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    TURNS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """What a program's tile is for: the routed expert, its pairs [BM], -1 where there is none, and which of the
    ``tiles`` of a row of the product it is.

    Tiles are numbered through the experts in order, behind those of ``early`` row blocks. E and beyond for an expert
    means that there is no such tile.
    """
    block = program // tiles - early
    every = tl.arange(0, BE)
    count = tl.load(counts + every, mask=every < E, other=0, cache_modifier=".cg")
    ends = tl.cumsum((count + BM - 1) // BM, axis=0)
    before = ends <= block
    expert = tl.sum((before & (every < E)).to(tl.int32), axis=0)
    first = tl.max(tl.where(before, ends, 0), axis=0)
    size = tl.sum(tl.where(every == expert, count, 0), axis=0)
    if TURNS == 1:
        row, tile = block - first, program % tiles
    else:
        row, tile = in_turns(program - (early + first) * tiles, (size + BM - 1) // BM, tiles, TURNS)
    place = row * BM + tl.arange(0, BM)
    if FLAT:
        at = lists + tl.sum(tl.where(every < expert, count, 0), axis=0) + place
    else:
        at = lists + expert.to(tl.int64) * tokens + place
    return expert, tl.load(at, mask=place < size, other=-1, cache_modifier=".cg"), tile
