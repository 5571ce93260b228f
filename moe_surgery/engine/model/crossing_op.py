"""The operator of a block in an engine: this library's kernels, or vLLM's experts where those are faster."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe import fused_experts

from moe_surgery.engine.model.crossover import NAME, SCHEMA, crosses
from moe_surgery.kernels.arguments import RouterTerms, Terms, Weights
from moe_surgery.kernels.choice import choose
from moe_surgery.kernels.op import compute, gathered, spread
from moe_surgery.kernels.routing import run_choice

_LIBRARY = torch.library.Library("moe_surgery", "FRAGMENT")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))


def compute_in_engine(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """``x`` [T, H], contiguous, to [T, H]; the number of tokens chooses whose experts, path and tiles."""
    if len(x) and crosses(terms, choose(terms, len(x), x.dtype)):
        return with_vllms_experts(x, weights, terms)
    return compute(x, weights, terms)


def with_vllms_experts(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """As :func:`compute_in_engine`, on the far side of the crossover; T > 0."""
    ids, routing = run_choice(_logits(x, weights.router, terms), x, _router(terms))
    out: Tensor = fused_experts(x, weights.w13, weights.w2, routing, ids)
    if weights.shared_gate is None or weights.shared_down is None:
        return out
    both = F.linear(x, weights.shared_gate)
    if weights.shared_up is not None:
        both = torch.cat([both, F.linear(x, weights.shared_up)], dim=-1)
    mixed = both.new_empty(len(x), both.shape[1] // 2)
    torch.ops._C.silu_and_mul(mixed, both)
    shared = F.linear(mixed, weights.shared_down)
    if weights.gate is None:
        return out.add_(shared, alpha=terms.shared_scale)
    return out.addcmul_(F.linear(x, weights.gate).sigmoid_(), shared, value=terms.shared_scale)


def _logits(x: Tensor, router: Tensor, terms: Terms) -> Tensor:
    """[T, E] in float32, rounded to the block's dtype where it rounds them."""
    if terms.native:
        return F.linear(x, router).float()
    return torch.mm(x, router.t(), out_dtype=torch.float32)


@lru_cache(maxsize=1024)
def _router(terms: Terms) -> RouterTerms:
    """The router of ``terms`` alone."""
    return RouterTerms(
        experts=terms.experts,
        top_k=terms.top_k,
        slices=0,
        hidden=terms.hidden,
        scoring="sigmoid" if terms.sigmoid else "softmax",
        by_logits=not terms.by_sigmoid,
        native=terms.native,
        soft_cap=0.0,
        groups=1,
        chosen=1,
        top2=False,
        lowest=False,
        renormalize=terms.renormalize,
        epsilon=0.0,
        floor=0.0,
        squares=False,
        scale=terms.scale,
        shared_scale=1.0,
        biased=False,
        corrected=False,
        gated=False,
    )


def _impl(x: Tensor, *rest: Any) -> Tensor:
    return compute_in_engine(x, *gathered(*rest))


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl(NAME, _impl, "CUDA")
torch.library.register_fake(f"moe_surgery::{NAME}", _fake, lib=_LIBRARY)


def engine_moe(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """:func:`compute_in_engine` as an operator."""
    result: Tensor = torch.ops.moe_surgery.engine_moe(x, *spread(weights, terms))
    return result
