"""Small blocks for the vLLM target's tests."""

from __future__ import annotations

import torch
from spec_weights import weights

from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.targets.vllm import VllmTarget
from moe_surgery.targets.vllm.block import FusedMoEBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGET = VllmTarget()
SPEC = MoESpec(
    hidden=64,
    router=RouterSpec(num_experts=8, top_k=2, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=8, width=48, activation="silu"),
    shared=SharedSpec(width=96, activation="silu", gate="sigmoid"),
)


def tokens(spec: MoESpec, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, spec.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


def build(spec: MoESpec = SPEC, dtype: torch.dtype = torch.float32) -> FusedMoEBlock:
    return TARGET.build(spec, weights(spec, dtype), prefix="model.layers.0.mlp")
