"""The operator of a block whose experts are chosen by vLLM's own router, and computed by this library's kernels.

The choice stays vLLM's to the bit: its router is asked as its own layer would ask it. It is found by the layer's name
in the forward's context, as vLLM's operators find their layers, since a graph can't hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context

from moe_surgery.engine.model.routed import ROUTED_NAME, ROUTED_SCHEMA, choose
from moe_surgery.kernels.arguments import Routed, Terms, Weights
from moe_surgery.kernels.op import compute, listed, scales_of, terms_of_routed

_LIBRARY = torch.library.Library("moe_surgery", "FRAGMENT")
_LIBRARY.define(ROUTED_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))


def compute_routed(x: Tensor, logits: Tensor, weights: Weights, terms: Terms, router: Any) -> Tensor:
    """``x`` [T, H], contiguous, to [T, H], by the experts that vLLM's ``router`` makes of ``logits`` [T, E]."""
    if len(x) == 0:
        return torch.empty_like(x)
    chosen, ids = choose(router, x, logits)
    given = torch.empty(len(x), terms.pairs, dtype=torch.float32, device=x.device)
    torch.mul(chosen, terms.scale, out=given[:, : terms.top_k])
    if weights.gate is not None:
        given[:, terms.top_k :] = F.linear(x, weights.gate).float().sigmoid_().mul_(terms.shared_scale)
    elif terms.slices:
        given[:, terms.top_k :] = terms.shared_scale
    return compute(x, weights, terms, Routed(ids.contiguous(), given))


def _impl(
    x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor, gate: Tensor | None, shared_gate: Tensor | None,
    shared_up: Tensor | None, shared_down: Tensor | None, scales: list[Tensor], layer: str, top_k: int,
    activation: str, scale: float, shared_scale: float,
) -> Tensor:  # fmt: skip
    router = get_forward_context().no_compile_layers[layer].router
    weights = Weights(w13, w13, w2, gate, shared_gate, shared_up, shared_down, scales=scales_of(scales))
    terms = terms_of_routed(weights, top_k, activation, scale, shared_scale)
    return compute_routed(x, logits, weights, terms, router)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl(ROUTED_NAME, _impl, "CUDA")
torch.library.register_fake(f"moe_surgery::{ROUTED_NAME}", _fake, lib=_LIBRARY)


def engine_routed_moe(x: Tensor, logits: Tensor, weights: Weights, terms: Terms, layer: str) -> Tensor:
    """:func:`compute_routed` as an operator, with the router of the ``layer`` of that name."""
    w, t = weights, terms
    result: Tensor = torch.ops.moe_surgery.engine_routed_moe(
        x, logits, w.w13, w.w2, w.gate, w.shared_gate, w.shared_up, w.shared_down, listed(w.scales), layer, t.top_k,
        t.activation, t.scale, t.shared_scale,
    )  # fmt: skip
    return result
