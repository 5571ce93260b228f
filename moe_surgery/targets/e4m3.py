"""Products with weights in e4m3, in plain torch: dequantised, and with what meets them rounded as the format says.

A token's activations are rounded on their way to such a matrix, in groups of as many as a block of it has columns, or
all together where each row of it has a scale. The greatest magnitude of a group becomes e4m3's greatest. That is part
of what a block computes, not noise, and so is what they are rounded to before that: a last bit there may move them to
another number of e4m3, an eighth away. So the truth has it too, and only what a kernel rounds besides is an error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.kernels.arguments import BLOCK, by_row

E4M3 = torch.float8_e4m3fn
_MOST = 448.0
_LEAST_SCALE = 1e-10 / _MOST
LEAST_BETWEEN = 1 / (_MOST * 512)
"""The least scale of what lies between the two products of a routed expert, and of whole tokens; others have a smaller
one."""


def product(rows: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``rows`` [P, K] by ``weight`` [N, K], with ``bias`` [N]: [P, N], in the dtype of ``rows``.

    With ``scale`` [N / BLOCK, K / BLOCK] or [N, 1] the weight is in e4m3.
    """
    if scale is None:
        return F.linear(rows, weight.to(rows.dtype), bias)
    work = torch.promote_types(rows.dtype, torch.float32)
    return F.linear(entered(rows, weight, scale), dequantised(weight, scale, work)).to(rows.dtype)


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [..., N, K] times its blocks' ``scale`` [..., N / BLOCK, K / BLOCK], or its rows' [..., N, 1]."""
    if by_row(weight, scale):
        return weight.to(dtype) * scale.to(dtype)
    return weight.to(dtype) * scale.to(dtype).repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)


def entered(rows: Tensor, weight: Tensor, scale: Tensor, *, between: bool = False) -> Tensor:
    """``rows`` [P, K] as they meet ``weight`` [..., N, K]; ``between`` the two products of a routed expert."""
    whole = by_row(weight, scale)
    return rounded(rows, LEAST_BETWEEN if between or whole else _LEAST_SCALE, rows.shape[-1] if whole else BLOCK)


def rounded(rows: Tensor, least: float, group: int) -> Tensor:
    """``rows`` [P, K] in groups of ``group`` as they meet weights in e4m3, in their dtype or float32 if that is more.

    No group's scale is below ``least``. Quotients are float32's own: a number halfway between two of e4m3, as one in
    sixteen is where a scale is a power of two, goes the other way for the last bit of a scale.
    """
    work = torch.promote_types(rows.dtype, torch.float32)
    groups = rows.float().unflatten(-1, (-1, group))
    most = groups.abs().amax(-1, keepdim=True)
    scale = (most / torch.full_like(most, _MOST)).clamp_min(least)  # by a number, CUDA multiplies by its inverse
    return ((groups / scale).clamp(-_MOST, _MOST).to(E4M3).to(work) * scale.to(work)).flatten(-2)
