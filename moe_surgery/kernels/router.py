"""A router of its own: from a token's logits to its experts and their weights, for any formula of the specification.

The paths in ``pairs`` and ``grouped`` choose experts by themselves where that needs the logits alone. Where scores are
corrected, grouped, capped or otherwise scored, this kernel runs between the logits and the experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import expert_of, keyed, let_next_start, score_of, wait, without


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` in float32, to some units in the last place also where it is small.

    ``log1p(e) = 2 artanh(e / (2 + e))``, as a series; the GPU's own logarithm is coarse near 1.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q / 15.0))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * series)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * s * series


@triton.jit
def tanh(x):
    """In float32, to some units in the last place also where it is small: there a quotient of polynomials."""
    q = x * x
    above = 135135.0 + q * (17325.0 + q * (378.0 + q))
    below = 135135.0 + q * (62370.0 + q * (3150.0 + q * 28.0))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(q < 1.0, x * above / below, tl.where(x < 0, -far, far))


@triton.jit
def best_of_all(keys):
    """The greatest of keys [G, S]."""
    return tl.max(tl.max(keys, axis=1), axis=0)


@triton.jit
def in_best_groups(
    by, there, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, TOP2: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """``by`` [G, S]; experts of all but the CHOSEN groups that have the best experts get minus infinity if LOWEST, else
    zero."""
    keys = keyed(by, tl.arange(0, SP)[None, :], there, SP)
    best = tl.max(keys, axis=1)
    score = score_of(best, by)
    if TOP2:
        score += score_of(tl.max(without(keys, best[:, None]), axis=1), by)
    group = tl.arange(0, GP)
    ranks = keyed(score, group, group < GROUPS, GP)
    inside = tl.zeros([GP], tl.int32)
    for _ in tl.static_range(0, CHOSEN):
        first = ranks == tl.max(ranks, axis=0)
        inside = tl.where(first, 1, inside)
        ranks = tl.where(first, -(1 << 63), ranks)
    return tl.where(inside[:, None] == 1, by, float("-inf") if LOWEST else 0.0)


@triton.jit
def route(
    logits, like, bias, correction, ids, weights, scale, shared_scale, R: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, GP: tl.constexpr,
    SP: tl.constexpr, SCORING: tl.constexpr, BY_LOGITS: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    ROUND: tl.constexpr, CORRECTED: tl.constexpr, TOP2: tl.constexpr, LOWEST: tl.constexpr,
    RENORMALIZE: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr, SQUARES: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``ids`` [T, K] and ``weights`` [T, K + M] of tokens whose ``logits`` are [T, R]. Grid: (tokens,).

    Experts lie in GROUPS rows, of which the powers of two above are GP rows of SP columns. With a BIAS, logits that
    ROUND are rounded to the dtype of ``like``, and its bias before. A CAP or FLOOR of 0 is none.
    """
    wait(PDL)
    let_next_start(PDL)
    size: tl.constexpr = E // GROUPS
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * R
    group, inner = tl.arange(0, GP)[:, None], tl.arange(0, SP)[None, :]
    expert = group * size + inner
    there = (group < GROUPS) & (inner < size)
    value = tl.load(row + expert, mask=there, other=0.0, cache_modifier=".cg")
    if BIAS:
        more = tl.load(bias + expert, mask=there, other=0.0)
        if ROUND:
            value += more.to(like.dtype.element_ty).to(tl.float32)
            value = value.to(like.dtype.element_ty).to(tl.float32)
        else:
            value += more.to(tl.float32)
    if CAP > 0:
        value = tanh(value / CAP) * CAP
    if SCORING == "softmax":
        most = best_of_all(tl.where(there, value, float("-inf")))
        score = tl.where(there, tl.exp(value - most), 0.0)
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    elif SCORING == "sigmoid":
        score = tl.sigmoid(value)
    else:
        tl.static_assert(SCORING == "sqrtsoftplus")
        score = tl.sqrt_rn(softplus(value))
    by = value if BY_LOGITS else score
    if CORRECTED:
        by += tl.load(correction + expert, mask=there, other=0.0).to(tl.float32)
    if GROUPS > 1:
        by = in_best_groups(by, there, GROUPS, CHOSEN, GP, SP, TOP2, LOWEST)
    keys = keyed(by, expert, there, GP * SP)
    slots = tl.arange(0, P)
    chosen = tl.zeros([P], tl.int32)
    values = tl.zeros([P], tl.float32)
    for slot in tl.static_range(0, K):
        best = best_of_all(keys)
        its = tl.sum(tl.sum(tl.where(keys == best, score, 0.0), axis=1), axis=0)
        keys = without(keys, best)
        chosen = tl.where(slots == slot, expert_of(best, GP * SP), chosen)
        values = tl.where(slots == slot, its, values)
    if RENORMALIZE:
        total = tl.sqrt_rn(tl.sum(values * values, axis=0)) if SQUARES else tl.sum(values, axis=0)
        total += EPSILON
        if FLOOR > 0:
            total = tl.maximum(total, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        values = values / total
    values *= scale
    if M > 0:
        gate = shared_scale
        if GATED:
            gate = shared_scale * tl.sigmoid(tl.load(row + E, cache_modifier=".cg"))
        values = tl.where(slots < K, values, gate)
    tl.store(ids + token * K + slots, chosen, mask=slots < K)
    tl.store(weights + token * (K + M) + slots, values, mask=slots < K + M)
