"""Experts one after another in torch, for what the layer's kernels have no function for: clamps, other activations.

The layer around them, its routing and its shared expert stay vLLM's own.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from moe_surgery.spec import Activation, ExpertsSpec, Mix
from moe_surgery.targets.formula import mixer

_NAMES: tuple[Activation, ...] = get_args(Activation)


@torch.library.custom_op("moe_surgery::experts_in_turn", mutates_args=())
def experts_in_turn(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    activation: int,
    gated: bool,
    limit: float | None,
    limit_after: bool,
    alpha: float,
    offset: float,
    on_input: bool,
) -> Tensor:
    """Tokens [T, H], weights and ids [T, k] to the weighted sum [T, H] of their experts' outputs.

    ``activation`` is a place in the list of activations; an operator takes no strings that it was compiled for. Sums
    are kept in float32 at least.
    """
    mix = mixer(Mix(_NAMES[activation], gated, limit, limit_after, alpha, offset))
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, slot, None]
        rows = x[token] * weight.to(x.dtype) if on_input else x[token]
        both = F.linear(rows, w13[expert], None if w13_bias is None else w13_bias[expert])
        gate, up = both.chunk(2, dim=-1) if gated else (both, both)
        y = F.linear(mix(gate, up), w2[expert], None if w2_bias is None else w2_bias[expert]).to(wide)
        out.index_add_(0, token, y if on_input else y * weight.to(wide))
    return out.to(x.dtype)


@experts_in_turn.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


class ExpertsInTurn(CPUUnquantizedExperts):  # type: ignore[misc]
    """Experts of vLLM's layer whose function its kernels don't have, one after another in torch."""

    spec: ExpertsSpec

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The weights stay as they are."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *rest: Any,
        **named: Any,
    ) -> None:
        s = self.spec
        out = experts_in_turn(
            hidden_states,
            w1,
            w2,
            self.w1_bias,
            self.w2_bias,
            topk_weights,
            topk_ids,
            _NAMES.index(s.activation),
            s.gated,
            s.limit,
            s.limit_after,
            s.alpha,
            s.offset,
            s.weights_on == "input",
        )
        output.copy_(out)
