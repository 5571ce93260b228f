"""The block as a registered operator, so that torch.compile and CUDA graphs take it as one opaque piece."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moe_surgery.kernels.arguments import Terms, Weights
from moe_surgery.kernels.choice import choose
from moe_surgery.kernels.launch import run

_LIBRARY = torch.library.Library("moe_surgery", "DEF")
_LIBRARY.define(
    "folded_moe(Tensor x, Tensor router, Tensor w13, Tensor w2, Tensor? shared13, Tensor? shared2, int top_k, "
    "str activation, bool sigmoid, bool renormalize, float scale, float shared_scale, bool gated, bool native, "
    "bool by_sigmoid) "
    "-> Tensor"
)


def compute(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """``x`` [T, H], contiguous, to [T, H]; the number of tokens chooses path and tiles."""
    if len(x) == 0:
        return torch.empty_like(x)
    with _on(x.device):
        return run(x, weights, terms, choose(terms, len(x), x.dtype))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; changing it takes time, so only where it must."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _folded_moe(
    x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, shared13: Tensor | None, shared2: Tensor | None, top_k: int,
    activation: str, sigmoid: bool, renormalize: bool, scale: float, shared_scale: float, gated: bool, native: bool,
    by_sigmoid: bool,
) -> Tensor:  # fmt: skip
    slices = 0 if shared13 is None else len(shared13)
    experts, hidden, width = w2.shape
    terms = Terms(
        experts, top_k, slices, hidden, width, activation, sigmoid, renormalize, scale, shared_scale, gated, native,
        by_sigmoid,
    )  # fmt: skip
    return compute(x, Weights(router, w13, w2, shared13, shared2), terms)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("folded_moe", _folded_moe, "CUDA")
torch.library.register_fake("moe_surgery::folded_moe", _fake, lib=_LIBRARY)


def folded_moe(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """:func:`compute` as an operator, for where a graph is being traced; eagerly its dispatch can be saved."""
    result: Tensor = torch.ops.moe_surgery.folded_moe(
        x, weights.router, weights.w13, weights.w2, weights.shared13, weights.shared2, terms.top_k, terms.activation,
        terms.sigmoid, terms.renormalize, terms.scale, terms.shared_scale, terms.gated, terms.native,
        terms.by_sigmoid,
    )  # fmt: skip
    return result
