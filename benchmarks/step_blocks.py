"""The blocks that step.py builds vLLM's Qwen2-MoE model with, in place of vLLM's own. Imports vLLM (0.24 to 0.26)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

from moe_surgery.kernels.arguments import Terms, Weights
from moe_surgery.kernels.op import folded_moe


class HandWrittenBlock(nn.Module):
    """The shared expert beside the routed ones, as a model without vLLM's shared-fused layer has it."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self.gate = ReplicatedLinear(hidden, experts, bias=False, prefix=f"{prefix}.gate")
        self.shared_expert_gate = ReplicatedLinear(hidden, 1, bias=False, prefix=f"{prefix}.shared_expert_gate")
        self.shared_expert = Qwen2MoeMLP(
            hidden, config.shared_expert_intermediate_size, config.hidden_act, prefix=f"{prefix}.shared_expert"
        )
        self.experts = FusedMoE(
            num_experts=experts,
            top_k=config.num_experts_per_tok,
            hidden_size=hidden,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits, _ = self.gate(hidden_states)
        routed = self.experts(hidden_states=hidden_states, router_logits=logits)
        shared = self.shared_expert(hidden_states)
        return routed + F.sigmoid(self.shared_expert_gate(hidden_states)[0]) * shared


class FoldedBlock(nn.Module):
    """Our kernels as a module of the model: one registered operator."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        slices = config.shared_expert_intermediate_size // width
        self.terms = Terms(
            experts=experts,
            top_k=config.num_experts_per_tok,
            slices=slices,
            hidden=hidden,
            width=width,
            activation="silu",
            sigmoid=False,
            renormalize=config.norm_topk_prob,
            scale=1.0,
            shared_scale=1.0,
            gated=True,
            native=True,
            by_sigmoid=False,
        )
        self.router = _empty(experts + 1, hidden)
        self.w13, self.w2 = _empty(experts, 2 * width, hidden), _empty(experts, hidden, width)
        self.shared13, self.shared2 = _empty(slices, 2 * width, hidden), _empty(slices, hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights = Weights(self.router, self.w13, self.w2, self.shared13, self.shared2)
        return folded_moe(hidden_states, weights, self.terms)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)
