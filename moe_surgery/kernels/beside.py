"""What stands between the two products of a gated shared expert that vLLM's own kernels compute: one launch.

A token's gate is computed beside its activations, and needs no products of its own on the way there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_surgery.kernels.device import as_stored, mixed


@triton.jit
def mix_and_gate(
    h, x, weight, act, share, factor, H: tl.constexpr, I: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """``act`` [T, I] of gate and up projections ``h`` [T, 2 I], and ``share`` [T] of ``x`` [T, H] by ``weight`` [H].

    Grid: (tokens, 1 + tiles of I); the first of a token computes its share, ``factor`` times the gate.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tile == 0:
        column = tl.arange(0, BH)
        inside = column < H
        row = tl.load(x + token * H + column, mask=inside, other=0.0).to(tl.float32)
        row *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        logit = as_stored(tl.sum(row, axis=0), x)
        tl.store(share + token, factor * as_stored(tl.sigmoid(logit), x))
    else:
        place = (tile - 1) * BI + tl.arange(0, BI)
        there = place < I
        first = tl.load(h + token * (2 * I) + place, mask=there, other=0.0).to(tl.float32)
        second = tl.load(h + token * (2 * I) + I + place, mask=there, other=0.0).to(tl.float32)
        # Rounded twice, as vLLM's kernels do.
        value = as_stored(mixed(first, first, ACT, False, 0.0, False, 1.0, 0.0), h)
        tl.store(act + token * I + place, value * second, mask=there)
