"""What the kernels share: activations, the ranking of experts, and programmatic dependent launch.

Programmatic dependent launch (CUDA Programming Guide, Hopper and later) lets a kernel start while the one before it
still runs. Two rules keep that right here. A kernel reads what earlier kernels wrote only after ``wait``; what the
kernel before the last wrote may be read earlier, because each kernel lets its successor start only after its own
``wait``. And such reads bypass L1 (``.cg``), which may hold lines from before. Weights are read at any time: nothing
writes them while a model runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before this one are done."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def mixed(
    gate, up, ACT: tl.constexpr, UP: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr, ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """``act(gate) * up`` in float32, with all that :class:`~moe_surgery.spec.Mix` has; a LIMIT of 0 is none."""
    if LIMIT > 0 and not AFTER:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "silu":
        value = gate * tl.sigmoid(ALPHA * gate)
    elif ACT == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh z) = sigmoid(2 z)
    else:
        value = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACT == "relu2":
            value = value * value
        else:
            tl.static_assert(ACT == "relu")
    if LIMIT > 0 and AFTER:
        value = tl.minimum(value, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if UP:
        if LIMIT > 0:
            up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        value = value * (up + OFFSET)
    return value


@triton.jit
def score(row, index, E: tl.constexpr, BY_SIGMOID: tl.constexpr):
    """What experts are ranked by: the logit, or its sigmoid, which may tie where logits differ."""
    value = tl.load(row + index, mask=index < E, other=float("-inf"), cache_modifier=".cg")
    if BY_SIGMOID:
        value = tl.sigmoid(value)
    return value


@triton.jit
def keyed(values, index, there, SIZE: tl.constexpr):
    """Keys, int64, that order as float32 ``values`` do; of equal values the lower ``index`` below SIZE is more.

    A key holds value and index, so that choosing the best takes a single reduction. No two are equal, and those that
    aren't ``there`` are less than all others, whatever the values are, NaN included.
    """
    bits = values.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # as floats order, so do these integers
    last = (SIZE - 1 - index).to(tl.int64)
    return tl.where(there, (bits.to(tl.int64) << 32) | last, -(1 << 63) + last)


@triton.jit
def keyed_in_two_bytes(values, like, index, there, SIZE: tl.constexpr):
    """The same in int32, of ``values`` that are rounded to the two-byte dtype that ``like`` points to.

    A warp finds the greatest of those by one instruction.
    """
    bits = values.to(like.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFF
    last = SIZE - 1 - index
    return tl.where(there, (bits << 16) | last, -(1 << 31) + last)


@triton.jit
def keys_of(values, like, index, E: tl.constexpr, BE: tl.constexpr, BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr):
    """Keys of experts ``index``, by score; NATIVE logits are rounded to the dtype that ``like`` points to."""
    if NATIVE and not BY_SIGMOID and like.dtype.element_ty.primitive_bitwidth == 16:
        keys = keyed_in_two_bytes(values, like, index, index < E, BE)
    else:
        keys = keyed(values, index, index < E, BE)
    return keys


@triton.jit
def ranking_keys(row, like, E: tl.constexpr, BE: tl.constexpr, BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr):
    """Keys [BE] of one token's experts."""
    index = tl.arange(0, BE)
    return keys_of(score(row, index, E, BY_SIGMOID), like, index, E, BE, BY_SIGMOID, NATIVE)


@triton.jit
def without(keys, best):
    """The keys with the best one made less than all others."""
    least: tl.constexpr = -(1 << (keys.dtype.primitive_bitwidth - 1))
    return tl.where(keys == best, least, keys)


@triton.jit
def expert_of(key, BE: tl.constexpr):
    """The expert that a key names."""
    return BE - 1 - (key & 0xFFFF).to(tl.int32)


@triton.jit
def score_of(key, like):
    """The score that a key holds."""
    if key.dtype.primitive_bitwidth == 32:
        bits = key >> 16
        bits ^= (bits >> 31) & 0x7FFF
        value = bits.to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        bits = (key >> 32).to(tl.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def choose(
    row, like, slots, scale, E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
    BY_SIGMOID: tl.constexpr, NATIVE: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token's experts and their routing weights, by slot; slots of K and beyond hold zeros."""
    keys = ranking_keys(row, like, E, BE, BY_SIGMOID, NATIVE)
    experts = tl.zeros_like(slots)
    scores = tl.zeros_like(slots).to(tl.float32)
    for slot in tl.static_range(0, K):
        best = tl.max(keys, axis=0)
        keys = without(keys, best)
        experts = tl.where(slots == slot, expert_of(best, BE), experts)
        scores = tl.where(slots == slot, score_of(best, like), scores)
    values = scores
    if SIGMOID and not BY_SIGMOID:
        values = tl.sigmoid(scores)
    elif not SIGMOID:
        most = tl.max(tl.where(slots == 0, scores, float("-inf")), axis=0)
        values = tl.exp(scores - most)
    values = tl.where(slots < K, values, 0.0)
    if RENORMALIZE:
        values = values / tl.sum(values, axis=0)
    elif not SIGMOID:
        logits = score(row, tl.arange(0, BE), E, False)
        values = values / tl.sum(tl.exp(logits - most), axis=0)
    return experts, values * scale


@triton.jit
def expert_offset(expert, stride, shared, slice_stride, E: tl.constexpr):
    """Where an expert's matrix begins, in elements from the routed experts' first.

    The shared expert lies in a tensor of its own, ``shared`` elements away, where its slices are ``slice_stride``
    elements apart, so that neither is ever copied.
    """
    expert = expert.to(tl.int64)
    return tl.where(expert < E, expert * stride, shared + (expert - E) * slice_stride)


@triton.jit
def row_pitch(expert, E: tl.constexpr, I: tl.constexpr, M: tl.constexpr):
    """How far apart the rows of an expert's down projection lie: a slice's are those of the whole shared expert."""
    if M <= 1:
        pitch = I
    else:
        pitch = tl.where(expert < E, I, M * I)
    return pitch


@triton.jit
def router_offset(rows, gate, R: tl.constexpr, E: tl.constexpr, H: tl.constexpr):
    """Where rows of the router's weight begin; row E is the shared expert's gate, ``gate`` elements away."""
    if R > E:
        start = tl.where(rows < E, rows.to(tl.int64) * H, gate)
    else:
        start = rows * H
    return start


@triton.jit
def in_e4m3(values, scale):
    """``values`` by ``scale`` in e4m3, rounded once; NaN stays NaN."""
    parts = tl.clamp(tl.div_rn(values, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return parts.to(tl.float8e4nv)


@triton.jit
def least_scale(routed):
    """The least scale of a group of activations on its way to the second product of ``routed`` experts, or to another.

    These are the numbers of vLLM's two kernels that round activations.
    """
    return tl.where(routed, 1.0 / (448.0 * 512.0), 1e-10 / 448.0)


@triton.jit
def scale_of(most, least):
    """The scale of a group of activations whose greatest magnitude is ``most``, which becomes e4m3's greatest."""
    return tl.maximum(tl.div_rn(most, tl.full([1] * len(most.shape), 448.0, tl.float32)), least)


@triton.jit
def rounded(values, least, R: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """``values`` [R, SIZE] on their way to weights in e4m3 with a scale for each block of GROUP by GROUP.

    Each row has the ``least`` scale of its groups, [R, 1] or one. They are rounded to e4m3, but still float32
    [R, SIZE / GROUP, GROUP], and have scales [R, SIZE / GROUP].
    """
    groups = tl.reshape(values, [R, SIZE // GROUP, GROUP])
    scale = scale_of(tl.max(tl.abs(groups), axis=2), least)
    return in_e4m3(groups, scale[:, :, None]).to(tl.float32), scale


@triton.jit
def as_stored(values, like):
    """``values``, float32, rounded to the dtype that ``like`` points to."""
    return values.to(like.dtype.element_ty).to(tl.float32)
