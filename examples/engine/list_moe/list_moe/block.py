"""The sparse block as one would write it from the formula: a list of MLPs, a loop, and no MoE layer of vLLM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2MoeConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig


class ExpertMLP(nn.Module):
    """A gated MLP. Under tensor parallelism every rank returns its part of the sum: the block reduces."""

    def __init__(self, hidden: int, width: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            hidden,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class WholeMLP(nn.Module):
    """A gated MLP that every rank holds and computes whole: there is nothing to reduce."""

    def __init__(self, hidden: int, width: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [width] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
            disable_tp=True,
        )
        self.down_proj = ReplicatedLinear(
            width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class ListMoeBlock(nn.Module):
    def __init__(self, config: Qwen2MoeConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.tp_size = get_tensor_model_parallel_world_size()
        self.gate = ReplicatedLinear(hidden, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = nn.ModuleList(
            ExpertMLP(hidden, config.moe_intermediate_size, quant_config, f"{prefix}.experts.{index}")
            for index in range(config.num_experts)
        )
        # Small as it is, a shared expert may be held by every rank instead of being shared out.
        self.whole_shared_expert = getattr(config, "whole_shared_expert", False)
        self.shared_expert = (WholeMLP if self.whole_shared_expert else ExpertMLP)(
            hidden, config.shared_expert_intermediate_size, quant_config, f"{prefix}.shared_expert"
        )
        self.shared_expert_gate = ReplicatedLinear(hidden, 1, bias=False, prefix=f"{prefix}.shared_expert_gate")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        scores = F.softmax(router_logits, dim=-1, dtype=torch.float32)
        top, ids = torch.topk(scores, self.top_k, dim=-1)
        if self.norm_topk_prob:
            top = top / top.sum(dim=-1, keepdim=True)
        top = top.to(hidden_states.dtype)

        # Every expert sees every token, with weight 0 where it wasn't chosen: no shape depends on the routing, so this
        # compiles as it is.
        gate, _ = self.shared_expert_gate(hidden_states)
        shared = F.sigmoid(gate) * self.shared_expert(hidden_states)
        out = torch.zeros_like(shared) if self.whole_shared_expert else shared
        for index, expert in enumerate(self.experts):
            weight = (top * (ids == index)).sum(dim=-1, keepdim=True)
            out = out + weight * expert(hidden_states)
        if self.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out + shared if self.whole_shared_expert else out
