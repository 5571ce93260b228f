"""The block as a registered operator, so that torch.compile and CUDA graphs take it as one opaque piece."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moe_surgery.kernels.arguments import SCHEMA, Terms, Weights
from moe_surgery.kernels.choice import choose
from moe_surgery.kernels.launch import run

_LIBRARY = torch.library.Library("moe_surgery", "DEF")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))


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
    x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, gate: Tensor | None, shared_gate: Tensor | None,
    shared_up: Tensor | None, shared_down: Tensor | None, top_k: int, activation: str, sigmoid: bool,
    renormalize: bool, scale: float, shared_scale: float, native: bool, by_sigmoid: bool,
) -> Tensor:  # fmt: skip
    experts, hidden, width = w2.shape
    terms = Terms(
        experts=experts,
        top_k=top_k,
        slices=0 if shared_down is None else shared_down.shape[1] // width,
        hidden=hidden,
        width=width,
        activation=activation,
        sigmoid=sigmoid,
        renormalize=renormalize,
        scale=scale,
        shared_scale=shared_scale,
        gated=gate is not None,
        native=native,
        by_sigmoid=by_sigmoid,
    )
    return compute(x, Weights(router, w13, w2, gate, shared_gate, shared_up, shared_down), terms)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("folded_moe", _folded_moe, "CUDA")
torch.library.register_fake("moe_surgery::folded_moe", _fake, lib=_LIBRARY)


def folded_moe(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """:func:`compute` as an operator, for where a graph is being traced; eagerly its dispatch can be saved."""
    result: Tensor = torch.ops.moe_surgery.folded_moe(
        x, weights.router, weights.w13, weights.w2, weights.gate, weights.shared_gate, weights.shared_up,
        weights.shared_down, terms.top_k, terms.activation, terms.sigmoid, terms.renormalize, terms.scale,
        terms.shared_scale, terms.native, terms.by_sigmoid,
    )  # fmt: skip
    return result
