"""More tokens: tokens are grouped by expert, so that each expert's weights are read once for all of its tokens.

    group_inputs   tokens in e4m3, where weights are
    group_logits, group_route    enter tokens in their experts' lists (:mod:`moe_surgery.kernels.grouping`)
    group_gate_up  a grouped matrix product over the lists, with the activation
    group_down     the other one, times the routing weights; one row for each pair of a token and an expert
    group_sum      adds each token's rows in the order of their slots

For many tokens ``group_sum_shared`` takes the place of the last one: it computes the shared expert's down projection as
one product, so that its rows are neither written nor read.

The order within a list depends on chance (integer atomics), but a row's value doesn't depend on its place in a tile,
and rows are added in a fixed order: the output is the same to the bit every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import (
    as_stored,
    expert_offset,
    in_e4m3,
    least_scale,
    let_next_start,
    mixed,
    rounded,
    row_pitch,
    scale_of,
    wait,
)
from moe_surgery.kernels.grouping import find_block, find_rows, shared_rows


@triton.jit
def group_inputs(x, parts, factors, H: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """Tokens ``x`` [T, H] in groups of G: ``parts`` in e4m3 and their scales ``factors`` [T, H / G].

    Grid: (tokens, cdiv(H, BK)).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    groups = tl.program_id(1) * (BK // G) + tl.arange(0, BK // G)
    wait(PDL)
    let_next_start(PDL)
    value = tl.load(x + token * H + columns, mask=columns < H, other=0.0).to(tl.float32)
    its, factor = rounded(value[None, :], least_scale(False), 1, BK, G)
    its = tl.reshape(its, [BK]).to(tl.float8e4nv)
    tl.store(parts + token * H + columns, its, mask=columns < H)
    tl.store(factors + token * (H // G) + groups, tl.reshape(factor, [BK // G]), mask=groups < H // G)


@triton.jit(do_not_specialize=["tokens", "shared_scales", "shared_up_scales"])
def group_gate_up(
    x, parts, factors, given, w13, scales, bias, shared: tl.int64, shared_up: tl.int64, shared_scales: tl.int64,
    shared_up_scales: tl.int64, act, act_factors, counts, lists, blocks, tokens, E: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, H: tl.constexpr, I: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr, BE: tl.constexpr, TURNS: tl.constexpr, LISTED: tl.constexpr, ACT: tl.constexpr,
    UP: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr,
    BIAS: tl.constexpr, GIVEN: tl.constexpr, ON_INPUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``act[pair] = act(W_gate x) * (W_up x)``. Grid: (cdiv(I, BI) * row blocks,).

    Where LISTED, ``blocks`` say what ``counts`` do otherwise. Weights in e4m3 have a scale for each block of G by G,
    else G is 0. Then ``parts`` and ``factors`` are those of :func:`group_inputs`, ``act`` and ``act_factors`` [pairs,
    I / G] the same of what is computed, and BK and BI are G.

    The shared expert's blocks come first: they need no routing, so they begin while it is being computed.
    """
    tiles: tl.constexpr = (I + BI - 1) // BI
    program = tl.program_id(0)
    block = program // tiles
    early = M * ((tokens + BM - 1) // BM)
    if block < early:
        expert, pairs, tile = shared_rows(tokens, program, tiles, E, K, max(M, 1), BM, TURNS)
    else:
        wait(PDL)
        if LISTED:
            expert, pairs, tile = find_block(blocks, lists, tokens, program, early, tiles, BM)
        else:
            expert, pairs, tile = find_rows(counts, lists, tokens, program, early, tiles, E, BE, BM, TURNS, GIVEN)
    let_next_start(PDL)
    if TURNS == 1:  # through the branches it would take 70 registers more
        tile = program % tiles
    if (block >= early) & (expert >= E):
        return
    valid = pairs >= 0
    token = (tl.maximum(pairs, 0) // (K + M)).to(tl.int64)
    columns = tl.arange(0, BK)
    # Rows of the gate and of the up projection in turns: one product is faster than two, and threads hold both.
    both = tl.arange(0, BI * (1 + UP))
    inner = tile * BI + both // (1 + UP)
    further = tl.where(expert < E, I * H, shared_up)
    starts = expert_offset(expert, (1 + UP) * I * H, shared, I * H, E) + both % (1 + UP) * further + inner * H
    at = w13 + starts[None, :] + columns[:, None]
    source = (parts if G > 0 else x) + token[:, None] * H + columns[None, :]
    if G > 0:
        tl.static_assert((BK == G) & (BI == G))
        matrix: tl.constexpr = (I // G) * (H // G)
        scale = scales + expert_offset(expert, (1 + UP) * matrix, shared_scales, matrix, E) + tile * (H // G)
        scale += both % (1 + UP) * tl.where(expert < E, matrix, shared_up_scales)
    total = tl.zeros([BM, BI * (1 + UP)], tl.float32)
    for k in range(0, H, BK):
        if H % BK == 0 and I % BI == 0:
            # The shared expert's blocks read what is in e4m3 before they wait.
            value = tl.load(source + k, mask=valid[:, None], other=0.0, cache_modifier=".cg" if G > 0 else "")
            w = tl.load(at + k)
        else:
            inside = k + columns < H
            value = tl.load(source + k, mask=valid[:, None] & inside[None, :], other=0.0)
            w = tl.load(at + k, mask=(inner < I)[None, :] & inside[:, None], other=0.0)
        if G > 0:
            factor = tl.load(factors + token * (H // G) + k // G, mask=valid, other=0.0, cache_modifier=".cg")
            total += tl.dot(value, w) * factor[:, None] * tl.load(scale + k // G)[None, :]
        else:
            total = tl.dot(value, w, total, input_precision="ieee")
    if G > 0:
        total = as_stored(total, x)
    if ON_INPUT:
        total *= tl.load(given + tl.maximum(pairs, 0), mask=valid & (expert < E), other=1.0)[:, None]
    if BIAS:
        its = bias + expert.to(tl.int64) * ((1 + UP) * I) + both % (1 + UP) * I + inner
        total += tl.load(its, mask=(inner < I) & (expert < E), other=0.0).to(tl.float32)[None, :]
    if UP:
        gate, up = tl.split(total.reshape(BM, BI, 2))
    else:
        gate, up = total, total
    rows = tile * BI + tl.arange(0, BI)
    to = act + tl.maximum(pairs, 0).to(tl.int64)[:, None] * I + rows[None, :]
    if block < early:
        wait(PDL)
    result = mixed(gate, up, ACT, UP, LIMIT, AFTER, ALPHA, OFFSET)
    if G > 0:
        if block < early:
            result = as_stored(result, x)
        factor = scale_of(tl.max(tl.abs(result), axis=1), least_scale(block >= early))
        result = in_e4m3(result, factor[:, None])
        tl.store(act_factors + tl.maximum(pairs, 0).to(tl.int64) * (I // G) + tile, factor, mask=valid)
    there = valid[:, None] & (rows < I)[None, :]
    # The next kernel reads it again, and weights, read once, would drive it out of L2.
    tl.store(to, result.to(act.dtype.element_ty), mask=there, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["tokens", "slices", "shared_scales"])
def group_down(
    act, act_factors, w2, scales, bias, shared: tl.int64, shared_scales: tl.int64, weights, rows_out, counts, lists,
    blocks, tokens, slices, E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, H: tl.constexpr, I: tl.constexpr,
    G: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, TURNS: tl.constexpr,
    LISTED: tl.constexpr, BIAS: tl.constexpr, GIVEN: tl.constexpr, ON_INPUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``rows_out[pair] = weights[pair] * W_down act[pair]``. Grid: (cdiv(H, BH) * row blocks,).

    ``slices`` of the shared expert are computed here: M, or 0 where the sum does. The lists are done before the kernel
    that makes ``act`` starts, so they are read before waiting for it.
    """
    tiles: tl.constexpr = (H + BH - 1) // BH
    program = tl.program_id(0)
    block = program // tiles
    early = (slices if M > 0 else 0) * ((tokens + BM - 1) // BM)
    if block < early:
        expert, pairs, tile = shared_rows(tokens, program, tiles, E, K, max(M, 1), BM, TURNS)
    else:
        if LISTED:
            expert, pairs, tile = find_block(blocks, lists, tokens, program, early, tiles, BM)
        else:
            expert, pairs, tile = find_rows(counts, lists, tokens, program, early, tiles, E, BE, BM, TURNS, GIVEN)
    if TURNS == 1:
        tile = program % tiles
    rows = tile * BH + tl.arange(0, BH)
    matrix = w2 + expert_offset(expert, H * I, shared, I, E)
    if G > 0:
        tl.static_assert((BK == G) & (BH <= G))
        of_rows = tile * BH // G * row_pitch(expert, E, I // G, M)
        scale = scales + expert_offset(expert, (H // G) * (I // G), shared_scales, I // G, E) + of_rows
    wait(PDL)
    let_next_start(PDL)
    if (block >= early) & (expert >= E):
        return
    valid = pairs >= 0
    pair = tl.maximum(pairs, 0).to(tl.int64)
    columns = tl.arange(0, BK)
    at = matrix + rows[None, :] * row_pitch(expert, E, I, M) + columns[:, None]
    source = act + pair[:, None] * I + columns[None, :]
    total = tl.zeros([BM, BH], tl.float32)
    for k in range(0, I, BK):
        if I % BK == 0 and H % BH == 0:
            value = tl.load(source + k, mask=valid[:, None], other=0.0)
            w = tl.load(at + k)
        else:
            inside = k + columns < I
            value = tl.load(source + k, mask=valid[:, None] & inside[None, :], other=0.0)
            w = tl.load(at + k, mask=(rows < H)[None, :] & inside[:, None], other=0.0)
        if G > 0:
            factor = tl.load(act_factors + pair * (I // G) + k // G, mask=valid, other=0.0)
            total += tl.dot(value, w) * (factor * tl.load(scale + k // G))[:, None]
        else:
            total = tl.dot(value, w, total, input_precision="ieee")
    if BIAS:
        its = bias + expert.to(tl.int64) * H + rows
        total += tl.load(its, mask=(rows < H) & (expert < E), other=0.0).to(tl.float32)[None, :]
    if ON_INPUT:
        total *= tl.load(weights + pair, mask=valid & (expert >= E), other=1.0)[:, None]
    else:
        total *= tl.load(weights + pair, mask=valid, other=0.0)[:, None]
    to = rows_out + pair[:, None] * H + rows[None, :]
    tl.store(to, total.to(rows_out.dtype.element_ty), mask=valid[:, None] & (rows < H)[None, :])


@triton.jit
def group_sum(
    rows_out, ids, out, P: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, GIVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over slots of rows_out[t * P + slot]`` in float32. Grid: (tokens, cdiv(H, BH)).

    Where GIVEN, slots below K that have no expert in ``ids`` have no row.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BH + tl.arange(0, BH)
    wait(PDL)
    let_next_start(PDL)
    total = tl.zeros([BH], tl.float32)
    for slot in tl.static_range(0, P):
        there = columns < H
        if GIVEN and slot < K:
            there = there & (tl.load(ids + token * K + slot) >= 0)
        total += tl.load(rows_out + (token * P + slot) * H + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * H + columns, total.to(out.dtype.element_ty), mask=columns < H)


@triton.jit(do_not_specialize=["tokens"])
def group_sum_shared(
    act, w2, shared: tl.int64, weights, rows_out, ids, out, tokens, K: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    I: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, GIVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The shared expert, plus the first K rows in the order of their slots. Grid: (cdiv(tokens, BM) * cdiv(H, BH),).

    Its slices' inputs lie side by side in ``act``, and all have one weight. Its product needs nothing of the kernel
    before this one, and begins while that runs.
    """
    tiles: tl.constexpr = (H + BH - 1) // BH
    width: tl.constexpr = M * I
    token = (tl.program_id(0) // tiles * BM + tl.arange(0, BM)).to(tl.int64)
    rows = tl.program_id(0) % tiles * BH + tl.arange(0, BH)
    valid = token < tokens
    columns = tl.arange(0, BK)
    source = act + (token[:, None] * (K + M) + K) * I + columns[None, :]
    at = w2 + shared + rows[None, :] * width + columns[:, None]
    total = tl.zeros([BM, BH], tl.float32)
    for k in range(0, width, BK):
        if width % BK == 0 and H % BH == 0:
            value = tl.load(source + k, mask=valid[:, None], other=0.0, cache_modifier=".cg")
            w = tl.load(at + k)
        else:
            inside = k + columns < width
            value = tl.load(source + k, mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
            w = tl.load(at + k, mask=(rows < H)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(value, w, total, input_precision="ieee")
    total *= tl.load(weights + token * (K + M) + K, mask=valid, other=0.0, cache_modifier=".cg")[:, None]
    wait(PDL)
    let_next_start(PDL)
    # Not unrolled: the rows of all slots at once would take the registers of larger tiles.
    for slot in tl.range(0, K, num_stages=2):
        there = valid
        if GIVEN:
            there = there & (tl.load(ids + token * K + slot, mask=valid, other=-1) >= 0)
        row = rows_out + (token * (K + M) + slot)[:, None] * H + rows[None, :]
        total += tl.load(row, mask=there[:, None] & (rows < H)[None, :], other=0.0).to(tl.float32)
    to = out + token[:, None] * H + rows[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=valid[:, None] & (rows < H)[None, :])
