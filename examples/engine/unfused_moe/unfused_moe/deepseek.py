"""DeepSeek-V3's sparse block: sigmoid scores, grouped top-k with a correction bias, a scale, ungated shared experts.

Neither child all-reduces its result; the block does, once, for the sum. The attention is plain, and the config is that
of GLM-4-MoE, which has DeepSeek's routing fields.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Glm4MoeConfig
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

from .decoder import SparseForCausalLM


class UnfusedDeepseekBlock(nn.Module):
    def __init__(self, config: Glm4MoeConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = ReplicatedLinear(config.hidden_size, config.n_routed_experts, bias=False, prefix=f"{prefix}.gate")
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            use_grouped_topk=True,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            scoring_func="sigmoid",
            e_score_correction_bias=self.gate.e_score_correction_bias,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )
        self.shared_experts = DeepseekV2MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            reduce_results=False,
            prefix=f"{prefix}.shared_experts",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        routed = self.experts(hidden_states=hidden_states, router_logits=router_logits)
        out = routed * self.routed_scaling_factor + self.shared_experts(hidden_states)
        return tensor_model_parallel_all_reduce(out) if self.tp_size > 1 else out


class UnfusedDeepseekLayer(Qwen2DecoderLayer):
    def __init__(
        self,
        config: Glm4MoeConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, cache_config, quant_config, prefix)
        self.mlp = UnfusedDeepseekBlock(config, quant_config, f"{prefix}.mlp")


class UnfusedDeepseekForCausalLM(SparseForCausalLM):
    layer_type = UnfusedDeepseekLayer
