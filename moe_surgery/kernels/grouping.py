"""How more tokens come into their experts' lists, for the products of :mod:`moe_surgery.kernels.grouped`.

    group_logits   router and shared gate for a tile of tokens; clears the experts' counts
    group_route    chooses each token's experts and enters the token in their lists

For many tokens ``group_clear`` and ``group_choose`` take the place of both: logits are chosen from where the product
left them, in registers, and the last program writes down which expert's rows each block of a product has. Where
experts are chosen outside, ``group_count`` and ``group_enter`` do. The order within a list depends on chance (integer
atomics).

Which tile of a product a program computes, and for which tokens of the lists, is here too: it is looked up
(``find_block``), or found from the counts (``find_rows``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import choose, keys_of, let_next_start, router_offset, score_of, wait, without


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
def group_clear(counts, E: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr):
    """Sets the experts' ``counts`` [E + 1] to zero. Grid: (1,)."""
    wait(PDL)
    let_next_start(PDL)
    every = tl.arange(0, 2 * BE)
    tl.store(counts + every, tl.zeros([2 * BE], tl.int32), mask=every <= E)


@triton.jit
def list_blocks(counts, blocks, most, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr):
    """What ``find_block`` looks up, for blocks of BM rows: their expert, number of rows, and first row of its list.

    They are numbered through the experts in order. All from then on to ``most`` have the expert E.
    """
    every, some, more = tl.arange(0, BE), tl.arange(0, 8)[None, :], tl.arange(0, BE)
    count = tl.load(counts + every, mask=every < E, other=0, cache_modifier=".cg")
    own = (count + BM - 1) // BM
    ends = tl.cumsum(own, axis=0)
    for start in range(0, tl.max(own, axis=0), 8):
        row = (start + some) * BM
        rows = tl.minimum(count[:, None] - row, BM).to(tl.int64)
        packed = (every.to(tl.int64)[:, None] << 48) | (rows << 32) | row
        tl.store(blocks + (ends - own)[:, None] + start + some, packed, mask=row < count[:, None])
    for start in range(tl.max(ends, axis=0), most, BE):
        tl.store(blocks + start + more, tl.full([BE], E, tl.int64) << 48, mask=start + more < most)


@triton.jit(do_not_specialize=["tokens", "most_up", "most_down"])
def group_choose(
    x, router, gate: tl.int64, weights, counts, lists, blocks, tokens, most_up, most_down, scale, shared_scale,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, P: tl.constexpr, SIGMOID: tl.constexpr, BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr,
    RENORMALIZE: tl.constexpr, GATED: tl.constexpr, UP_ROWS: tl.constexpr, DOWN_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``group_logits`` and ``group_route`` for BT tokens at once, all of their experts. Grid: (cdiv(tokens, BT),).

    An expert's places in its list are taken for all of a program's tokens by one addition. ``blocks`` are of UP_ROWS
    rows each for the first product, ``most_up`` of them, and then of DOWN_ROWS for the second, if that isn't the same.
    ``counts`` [E + 1] ends with the programs that are done.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = token < tokens
    every, slots, columns = tl.arange(0, BE), tl.arange(0, P)[None, :], tl.arange(0, BK)
    source = x + token.to(tl.int64)[:, None] * H + columns[None, :]
    at = router + every[None, :] * H + columns[:, None]
    total = tl.zeros([BT, BE], tl.float32)
    few = tl.arange(0, 16)  # the gate is the first column of the least product that there is
    gates = tl.zeros([BT, 16], tl.float32)
    for k in range(0, H, BK):
        inside = k + columns < H
        # Other kernels wrote the tokens before the one that this one waits for began.
        value = tl.load(source + k, mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        w = tl.load(at + k, mask=(every < E)[None, :] & inside[:, None], other=0.0)
        value = value.to(w.dtype)
        total = tl.dot(value, w, total, input_precision="ieee")
        if GATED:
            w = tl.load(
                router + gate + k + columns[:, None] + few[None, :] * 0,
                mask=(few == 0)[None, :] & inside[:, None],
                other=0.0,
            )
            gates = tl.dot(value, w, gates, input_precision="ieee")
    if NATIVE:
        total = total.to(x.dtype.element_ty).to(tl.float32)
    keys = keys_of(tl.sigmoid(total) if BY_SIGMOID else total, x, every[None, :], E, BE, BY_SIGMOID, NATIVE)
    slot_of = tl.full([BT, BE], -1, tl.int32)
    scores = tl.zeros([BT, P], tl.float32)
    for slot in tl.static_range(0, K):
        best = tl.max(keys, axis=1, keep_dims=True)
        slot_of = tl.where(keys == best, slot, slot_of)
        keys = without(keys, best)
        scores = tl.where(slots == slot, score_of(best, x), scores)
    values = scores
    if SIGMOID and not BY_SIGMOID:
        values = tl.sigmoid(scores)
    elif not SIGMOID:
        most = tl.max(tl.where(slots == 0, scores, float("-inf")), axis=1, keep_dims=True)
        values = tl.exp(scores - most)
    values = tl.where(slots < K, values, 0.0)
    if RENORMALIZE:
        values = values / tl.sum(values, axis=1, keep_dims=True)
    elif not SIGMOID:
        values = values / tl.sum(tl.where((every < E)[None, :], tl.exp(total - most), 0.0), axis=1, keep_dims=True)
    values *= scale
    if M > 0:
        share = shared_scale
        if GATED:
            share = shared_scale * tl.sigmoid(tl.sum(gates, axis=1, keep_dims=True))
        values = tl.where(slots < K, values, share)
    wait(PDL)
    let_next_start(PDL)
    pair = token[:, None] * (K + M)
    tl.store(weights + pair + slots, values, mask=valid[:, None] & (slots < K + M))
    chosen = (slot_of >= 0) & valid[:, None]
    # How many of the program's earlier tokens an expert has: a triangle of ones times the choices, exactly.
    row = tl.arange(0, BT)
    ones = (row[:, None] > row[None, :]).to(tl.float16)
    earlier = tl.dot(ones, chosen.to(tl.float16)).to(tl.int32)
    many = tl.sum(chosen.to(tl.int32), axis=0)
    first = tl.atomic_add(counts + every, many, mask=many > 0, sem="relaxed")
    place = first[None, :] + earlier
    tl.store(lists + every.to(tl.int64)[None, :] * tokens + place, pair + slot_of, mask=chosen)
    tl.debug_barrier()
    if tl.atomic_add(counts + E, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        list_blocks(counts, blocks, most_up, E, BE, UP_ROWS)
        if DOWN_ROWS != UP_ROWS:
            list_blocks(counts, blocks + most_up, most_down, E, BE, DOWN_ROWS)


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
def find_block(blocks, lists, tokens, program, early, tiles: tl.constexpr, BM: tl.constexpr):
    """As :func:`find_rows`, from what ``list_blocks`` wrote, so that no program has to go through all counts."""
    packed = tl.load(blocks + (program // tiles - early), cache_modifier=".cg")
    expert, rows = (packed >> 48).to(tl.int32), ((packed >> 32) & 0xFFFF).to(tl.int32)
    place = tl.arange(0, BM)
    at = lists + expert.to(tl.int64) * tokens + (packed & 0xFFFFFFFF) + place
    return expert, tl.load(at, mask=place < rows, other=-1, cache_modifier=".cg"), program % tiles


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
