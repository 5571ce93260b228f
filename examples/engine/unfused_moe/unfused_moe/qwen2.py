"""Qwen2-MoE: softmax top-k, and a shared expert behind a sigmoid gate. Both children all-reduce their own result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2MoeConfig
from vllm.config import CacheConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

from .decoder import SparseForCausalLM


class UnfusedQwen2Block(nn.Module):
    def __init__(self, config: Qwen2MoeConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = ReplicatedLinear(hidden, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=hidden,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )
        self.shared_expert = Qwen2MoeMLP(
            hidden_size=hidden,
            intermediate_size=config.shared_expert_intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.shared_expert",
        )
        self.shared_expert_gate = ReplicatedLinear(hidden, 1, bias=False, prefix=f"{prefix}.shared_expert_gate")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        routed = self.experts(hidden_states=hidden_states, router_logits=router_logits)
        gate, _ = self.shared_expert_gate(hidden_states)
        return routed + F.sigmoid(gate) * self.shared_expert(hidden_states)


class UnfusedQwen2Layer(Qwen2DecoderLayer):
    def __init__(
        self,
        config: Qwen2MoeConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, cache_config, quant_config, prefix)
        self.mlp = UnfusedQwen2Block(config, quant_config, f"{prefix}.mlp")


class UnfusedQwen2MoeForCausalLM(SparseForCausalLM):
    layer_type = UnfusedQwen2Layer
