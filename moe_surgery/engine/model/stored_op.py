"""The operator of a block over quantised weights or behind vLLM's router: this library's kernels, or vLLM's layer.

Where the kernels compute, they choose experts as well, or vLLM's router does, to the bit as for its own layer. Where
that is faster it computes all of the block: it was rebuilt with the shared expert inside. It is found by its name in
the forward's context, as vLLM's operators find their layers, since a graph can't hold it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context

from moe_surgery.engine.model.crossover import STORED_NAME, STORED_SCHEMA, crosses
from moe_surgery.engine.model.routed import choose
from moe_surgery.kernels.arguments import Routed, Terms, Weights
from moe_surgery.kernels.choice import choose as choose_tiles
from moe_surgery.kernels.op import compute, gathered, given, spread

_LIBRARY = torch.library.Library("moe_surgery", "FRAGMENT")
_LIBRARY.define(STORED_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))


def compute_stored(
    x: Tensor, logits: Tensor | None, weights: Weights, terms: Terms, runner: Any, vllm: bool | None = None
) -> Tensor:
    """``x`` [T, H], contiguous, to [T, H]; ``runner`` is vLLM's layer, whose router is given the ``logits`` [T, E].

    Without logits the kernels compute them, and choose experts by them. The number of tokens says whether the layer
    computes all, unless ``vllm`` does.
    """
    if len(x) == 0:
        return torch.empty_like(x)
    if crosses(terms, choose_tiles(terms, len(x), x.dtype)) if vllm is None else vllm:
        return _of_layer(x, logits, weights, terms, runner)
    return compute(x, weights, terms, None if logits is None else routed_by(runner.router, x, logits, weights, terms))


def _of_layer(x: Tensor, logits: Tensor | None, weights: Weights, terms: Terms, runner: Any) -> Tensor:
    """All of the block by vLLM's layer."""
    if runner.gate is not None:  # it computes them itself
        logits = x
    elif logits is None:
        native = terms.native
        logits = F.linear(x, weights.router) if native else torch.mm(x, weights.router.t(), out_dtype=torch.float32)
    out: Tensor = runner(hidden_states=x, router_logits=logits)
    return out


def routed_by(router: Any, x: Tensor, logits: Tensor, weights: Weights, terms: Terms) -> Routed:
    """What vLLM's ``router`` makes of ``logits`` [T, E], and what the shared expert counts."""
    chosen, ids = choose(router, x, logits)
    both = torch.empty(len(x), terms.pairs, dtype=torch.float32, device=x.device)
    torch.mul(chosen, terms.scale, out=both[:, : terms.top_k])
    if weights.gate is not None:
        both[:, terms.top_k :] = F.linear(x, weights.gate).float().sigmoid_().mul_(terms.shared_scale)
    elif terms.slices:
        both[:, terms.top_k :] = terms.shared_scale
    return Routed(ids.contiguous(), both)


def _impl(x: Tensor, logits: Tensor | None, layer: str, *rest: Any) -> Tensor:
    weights, terms = gathered(*rest)
    if logits is not None:
        terms = given(terms)
    return compute_stored(x, logits, weights, terms, get_forward_context().no_compile_layers[layer])


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl(STORED_NAME, _impl, "CUDA")
torch.library.register_fake(f"moe_surgery::{STORED_NAME}", _fake, lib=_LIBRARY)


def engine_stored_moe(x: Tensor, logits: Tensor | None, weights: Weights, terms: Terms, layer: str) -> Tensor:
    """:func:`compute_stored` as an operator, with the ``layer`` of that name."""
    result: Tensor = torch.ops.moe_surgery.engine_stored_moe(x, logits, layer, *spread(weights, terms))
    return result
