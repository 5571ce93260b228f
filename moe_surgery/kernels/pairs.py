"""Few tokens: every pair of a token and an expert is computed for itself, in three launches.

    pair_logits    router and shared gate, one row per program
    pair_gate_up   chooses the experts (each program again, from the logits), then act(W_gate x) * (W_up x)
    pair_down      W_down of all pairs of a token, weighted and added in the order of their slots

Slots 0 … K-1 of a token are its routed experts by rank, K … K+M-1 the slices of the shared expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import (
    as_stored,
    choose,
    expert_of,
    expert_offset,
    in_e4m3,
    least_scale,
    let_next_start,
    mixed,
    ranking_keys,
    rounded,
    router_offset,
    row_pitch,
    scale_of,
    wait,
    without,
)


@triton.jit
def pair_logits(
    x, router, gate: tl.int64, logits, counts, R: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, NATIVE: tl.constexpr, CLEAR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``logits[t, r] = router[r] · x[t]`` in float32; rows below E are rounded to the input's dtype if NATIVE.

    Grid: (cdiv(R, BR), tokens). The router's weights are fetched before waiting for ``x``. CLEAR is a power of two, E
    or more, where the experts' ``counts`` are to be set to zero for the grouped path, else 0.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BK)
    at = router + router_offset(rows, gate, R, E, H)[:, None] + columns[None, :]
    w = tl.load(at, mask=(rows < R)[:, None] & (columns < H)[None, :], other=0.0)
    wait(PDL)
    let_next_start(PDL)
    if CLEAR > 0:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            every = tl.arange(0, CLEAR)
            tl.store(counts + every, tl.zeros([CLEAR], tl.int32), mask=every < E)
    total = tl.zeros([BR, BK], tl.float32)
    for k in tl.static_range(0, H, BK):
        value = tl.load(x + token * H + k + columns, mask=k + columns < H, other=0.0, cache_modifier=".cg")
        total += w.to(tl.float32) * value.to(tl.float32)[None, :]
        if k + BK < H:
            more = k + BK + columns
            w = tl.load(at + k + BK, mask=(rows < R)[:, None] & (more < H)[None, :], other=0.0)
    result = tl.sum(total, axis=1)
    if NATIVE:
        result = tl.where(rows < E, result.to(x.dtype.element_ty).to(tl.float32), result)
    tl.store(logits + token * R + rows, result, mask=rows < R)


@triton.jit(do_not_specialize=["tokens", "shared_scales", "shared_up_scales"])
def pair_gate_up(
    x, logits, given, w13, scales, bias, shared: tl.int64, shared_up: tl.int64, shared_scales: tl.int64,
    shared_up_scales: tl.int64, act, tokens, R: tl.constexpr, E: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, G: tl.constexpr, BY_ROW: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, TOKEN: tl.constexpr, ACT: tl.constexpr, UP: tl.constexpr, LIMIT: tl.constexpr,
    AFTER: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, GIVEN: tl.constexpr,
    ON_INPUT: tl.constexpr, BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``act[t, slot] = act(W_gate x) * (W_up x)``. Grid: (tokens * (K + M), cdiv(I, BI)).

    Of weights in e4m3, G is the size of their blocks, of which a tile's rows are in one; BY_ROW each row has a scale,
    and so has each token. Else both are 0. TOKEN is the next power of H.

    Where GIVEN, ``logits`` are the chosen experts' ids, ``given`` their weights, and this is the first kernel.

    Slots of the shared expert come first: they need no routing, so they begin while the logits are being computed.
    All pairs of a tile run together, so that an expert which several tokens visit is read from memory once.
    """
    token = tl.program_id(0) % tokens
    slot = (tl.program_id(0) // tokens + K) % (K + M)
    expert = E + slot - K
    if slot < K:
        wait(PDL)
        if GIVEN:
            expert = tl.maximum(tl.load(logits + token * K + slot), 0)
        else:
            keys = ranking_keys(logits + token * R, x, E, BE, BY_SIGMOID, NATIVE)
            for _ in range(slot):
                keys = without(keys, tl.max(keys, axis=0))
            expert = expert_of(tl.max(keys, axis=0), BE)
    let_next_start(PDL)
    columns = tl.arange(0, BK)
    rows = tl.program_id(1) * BI + tl.arange(0, BI)
    at = w13 + expert_offset(expert, (1 + UP) * I * H, shared, I * H, E) + rows[:, None] * H + columns[None, :]
    up = tl.where(expert < E, I * H, shared_up)
    gates = tl.zeros([BI, BK], tl.float32)
    ups = tl.zeros([BI, BK], tl.float32)
    if G > 0:
        matrix: tl.constexpr = (I // G) * (H // G)
        block = tl.program_id(1) * BI // G * (H // G) + tl.arange(0, BK // G)
        scale = scales + expert_offset(expert, (1 + UP) * matrix, shared_scales, matrix, E) + block
        up_scale = scale + tl.where(expert < E, matrix, shared_up_scales)
    if BY_ROW:
        every = tl.arange(0, TOKEN)
        token_x = tl.load(x + token * H + every, mask=every < H, other=0.0, cache_modifier=".cg").to(tl.float32)
        whole = tl.max(tl.abs(token_x)[None, :], axis=1)
        factor = scale_of(whole, least_scale(True))
    for k in range(0, H, BK):
        mask = (rows < I)[:, None] & (k + columns < H)[None, :]
        g = tl.load(at + k, mask=mask, other=0.0)
        source = x + token * H + k + columns
        value = tl.load(source, mask=k + columns < H, other=0.0, cache_modifier=".cg").to(tl.float32)[None, :]
        if G > 0:
            there = (k + tl.arange(0, BK // G) * G < H)[None, :]
            parts, factor = rounded(value, least_scale(False), 1, BK, G)
            toward = factor * tl.load(scale + k // G, mask=k + tl.arange(0, BK // G) * G < H, other=0.0)[None, :]
            value = tl.reshape(parts * tl.where(there, toward, 0.0)[:, :, None], [1, BK])
        if BY_ROW:
            value = in_e4m3(value, factor[:, None]).to(tl.float32)
        gates += g.to(tl.float32) * value
        if UP:
            u = tl.load(at + k + up, mask=mask, other=0.0)
            if G > 0:
                toward = factor * tl.load(up_scale + k // G, mask=k + tl.arange(0, BK // G) * G < H, other=0.0)[None, :]
                value = tl.reshape(parts * tl.where(there, toward, 0.0)[:, :, None], [1, BK])
            ups += u.to(tl.float32) * value
    gate = tl.sum(gates, axis=1)
    rise = tl.sum(ups, axis=1)
    if BY_ROW:
        its_scale = scales + expert_offset(expert, (1 + UP) * I, shared_scales, I, E) + rows
        gate *= factor * tl.load(its_scale, mask=rows < I, other=0.0)
        if UP:
            up_by = its_scale + tl.where(expert < E, I, shared_up_scales)
            rise *= factor * tl.load(up_by, mask=rows < I, other=0.0)
    if G > 0 or BY_ROW:
        gate = as_stored(gate, x)
        rise = as_stored(rise, x)
    if ON_INPUT:
        factor = tl.load(given + token * (K + M) + slot, mask=slot < K, other=1.0)
        gate *= factor
        rise *= factor
    if BIAS:
        its = bias + expert.to(tl.int64) * ((1 + UP) * I) + rows
        there = (rows < I) & (expert < E)
        gate += tl.load(its, mask=there, other=0.0).to(tl.float32)
        if UP:
            rise += tl.load(its + I, mask=there, other=0.0).to(tl.float32)
    result = mixed(gate, rise, ACT, UP, LIMIT, AFTER, ALPHA, OFFSET)
    if BY_ROW:
        result = as_stored(result, x)
    if slot >= K:
        if G > 0:
            result = as_stored(result, x)
        wait(PDL)
    to = act + (token * (K + M) + slot) * I + rows
    tl.store(to, result.to(act.dtype.element_ty), mask=rows < I)


@triton.jit(do_not_specialize=["shared_scales"])
def pair_down(
    act, logits, given, w2, scales, bias, shared: tl.int64, shared_scales: tl.int64, out, scale, shared_scale,
    R: tl.constexpr, E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, P: tl.constexpr, H: tl.constexpr,
    I: tl.constexpr, G: tl.constexpr, BY_ROW: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
    BE: tl.constexpr, SIGMOID: tl.constexpr, BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr,
    RENORMALIZE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GIVEN: tl.constexpr, ON_INPUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over slots of weight * W_down act[t, slot]``. Grid: (tokens, cdiv(H, BH)); P = next power of K+M.

    The experts are known before ``act`` is, so weights are fetched before waiting for it: the first AHEAD tiles, and
    from then on as many before they are needed.
    """
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, P)
    there = slots < K + M
    if GIVEN:
        experts = tl.load(logits + token * K + slots, mask=slots < K, other=0)
        weights = tl.load(given + token * (K + M) + slots, mask=there, other=0.0)
        there = there & (experts >= 0)
        experts = tl.maximum(experts, 0)
        if ON_INPUT:
            weights = tl.where(slots < K, 1.0, weights)
    else:
        experts, weights = choose(
            logits + token * R, out, slots, scale, E, BE, K, SIGMOID, BY_SIGMOID, NATIVE, RENORMALIZE
        )
    experts = tl.where(slots < K, experts, E + slots - K)
    if M > 0 and not GIVEN:
        gate = shared_scale
        if GATED:
            gate = shared_scale * tl.sigmoid(tl.load(logits + token * R + E, cache_modifier=".cg"))
        weights = tl.where(slots < K, weights, gate)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    columns = tl.arange(0, BK)
    offset = expert_offset(experts, H * I, shared, I, E)
    inner = rows[None, :, None] * (row_pitch(experts[:, None, None], E, I, M))
    at = w2 + offset[:, None, None] + inner + columns[None, None, :]
    inside = there[:, None, None] & (rows < H)[None, :, None]
    fetched = ()
    for k in tl.static_range(0, min(AHEAD * BK, I), BK):
        fetched += (tl.load(at + k, mask=inside & (k + columns < I)[None, None, :], other=0.0),)
    if G > 0:
        block = tl.program_id(1) * BH // G * row_pitch(experts, E, I // G, M)
        its_scale = scales + expert_offset(experts, (H // G) * (I // G), shared_scales, I // G, E) + block
    wait(PDL)
    let_next_start(PDL)
    source = act + (token * (K + M) + slots)[:, None] * I + columns[None, :]
    if BY_ROW:
        most = tl.zeros([P], tl.float32)
        for k in tl.static_range(0, I, BK):
            mask = there[:, None] & (k + columns < I)[None, :]
            a = tl.load(source + k, mask=mask, other=0.0, cache_modifier=".cg")
            most = tl.maximum(most, tl.max(tl.abs(a), axis=1), propagate_nan=tl.PropagateNan.ALL)
        # The shared expert's slices are parts of one row.
        both = tl.max(tl.where((slots >= K) & there, most, 0.0), axis=0)
        factors = scale_of(tl.where(slots < K, most, both), least_scale(True))
    total = tl.zeros([P, BH], tl.float32)
    for k in tl.static_range(0, I, BK):
        mask = there[:, None] & (k + columns < I)[None, :]
        a = tl.load(source + k, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        if G > 0:
            groups = k // G + tl.arange(0, BK // G)
            parts, factor = rounded(a, least_scale(slots < K)[:, None], P, BK, G)
            held = there[:, None] & (groups < I // G)[None, :]
            factor *= tl.load(its_scale[:, None] + groups[None, :], mask=held, other=0.0)
            a = tl.reshape(parts * factor[:, :, None], [P, BK])
        if BY_ROW:
            a = in_e4m3(a, factors[:, None]).to(tl.float32)
        total += tl.sum(fetched[k // BK].to(tl.float32) * a[:, None, :], axis=2)
        if k + AHEAD * BK < I:
            more = k + AHEAD * BK
            fetched += (tl.load(at + more, mask=inside & (more + columns < I)[None, None, :], other=0.0),)
    if BY_ROW:
        by = scales + expert_offset(experts, H, shared_scales, 0, E)[:, None] + rows[None, :]
        total *= factors[:, None] * tl.load(by, mask=there[:, None] & (rows < H)[None, :], other=0.0)
    if BIAS:
        its = bias + experts.to(tl.int64)[:, None] * H + rows[None, :]
        total += tl.load(its, mask=(there & (slots < K))[:, None] & (rows < H)[None, :], other=0.0).to(tl.float32)
    # A slot beyond K + M has no output, and NaN times zero would make one.
    result = tl.sum(tl.where(there[:, None], total * weights[:, None], 0.0), axis=0)
    tl.store(out + token * H + rows, result.to(out.dtype.element_ty), mask=rows < H)
