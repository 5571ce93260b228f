"""A decoder-only model whose MoE blocks have the size of Qwen3-Omni's talker, with random weights on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


def config(layers: int) -> Qwen2MoeConfig:
    """Hidden 1024, 128 experts of width 384, top-6, shared width 768; as many layers as are asked for."""
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        vocab_size=3072,
        hidden_size=1024,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=384,
        shared_expert_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )


def build(layers: int, implementation: str = "grouped_mm") -> Any:
    """The model in bfloat16, every matrix of standard deviation ``fan_in ** -0.5``."""
    made = config(layers)
    made._experts_implementation = implementation
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen2MoeForCausalLM(made)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()
