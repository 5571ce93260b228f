"""The decoder of Qwen3-Omni's talker, got by patching vLLM's Qwen3-MoE by hand.

Every sparse block is built without a shared expert, then gets one attached, and its forward is replaced on the
instance. It computes the right thing, but routed and shared experts run one after the other, outside vLLM's layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import maybe_prefix


class NaiveTalkerForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE with a sigmoid-gated shared expert in every sparse block. Loads weights as its parent does."""

    # Quantisation and adapters find the shared expert's two projections by this; the parent has no such layer.
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_text_config
        width = config.shared_expert_intermediate_size
        # Newer vLLM releases build a shared expert of their own where the config names a width.
        config.shared_expert_intermediate_size = 0
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.shared_expert_intermediate_size = width
        layers = maybe_prefix(prefix, "model.layers")
        for index, layer in enumerate(self.model.layers):
            mlp = getattr(layer, "mlp", None)  # the layers of other pipeline ranks have none
            if isinstance(mlp, Qwen3MoeSparseMoeBlock):
                attach_shared_expert(mlp, config, vllm_config.quant_config, f"{layers}.{index}.mlp")


def attach_shared_expert(
    mlp: nn.Module, config: PretrainedConfig, quant_config: QuantizationConfig | None, prefix: str
) -> None:
    if mlp.is_sequence_parallel:
        raise NotImplementedError("the talker's patched block can't run sequence-parallel")
    mlp.shared_expert = Qwen2MoeMLP(
        hidden_size=config.hidden_size,
        intermediate_size=config.shared_expert_intermediate_size,
        hidden_act=config.hidden_act,
        quant_config=quant_config,
        prefix=f"{prefix}.shared_expert",
    )
    mlp.shared_expert_gate = ReplicatedLinear(
        config.hidden_size, 1, bias=False, quant_config=None, prefix=f"{prefix}.shared_expert_gate"
    )
    mlp.forward = make_forward(mlp)


def make_forward(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What replaces ``mlp.forward``: ``experts(x) + sigmoid(shared_expert_gate(x)) * shared_expert(x)``.

    Both terms come all-reduced from their modules, so nothing is left to do under tensor parallelism.
    """

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        x = hidden_states.view(-1, shape[-1])
        try:
            internal = mlp.experts.gate is not None  # then the experts compute the router logits themselves
        except AttributeError:
            internal = False
        router_logits = x if internal else mlp.gate(x)[0]
        out = mlp.experts(hidden_states=x, router_logits=router_logits)
        if getattr(mlp, "shared_expert", None) is not None:
            shared = mlp.shared_expert(x)
            if hasattr(mlp, "shared_expert_gate") and mlp.shared_expert_gate is not None:
                shared = F.sigmoid(mlp.shared_expert_gate(x)[0]) * shared
            out = out + shared
        return out.view(shape)

    return forward
