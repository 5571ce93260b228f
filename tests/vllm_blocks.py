"""Small blocks for the vLLM target's tests."""

from __future__ import annotations

import math

import torch

from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.targets.vllm import VllmTarget
from moe_surgery.targets.vllm.block import FusedMoEBlock
from moe_surgery.weights.tensors import BlockTensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGET = VllmTarget()
SPEC = MoESpec(
    hidden=64,
    router=RouterSpec(num_experts=8, top_k=2, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=8, width=48, activation="silu"),
    shared=SharedSpec(width=96, activation="silu", gate="sigmoid"),
)


def tolerance(spec: MoESpec, dtype: torch.dtype) -> float:
    """Relative L2 error of one token: sums of H + I terms in float32, and some roundings to ``dtype``.

    Rounded are the logits, the weights, each MLP's inner product and the two outputs, each by up to half an eps.
    """
    return math.sqrt(spec.hidden + spec.experts.width) * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps


def weights(spec: MoESpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> BlockTensors:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)

    hidden, experts, width, shared = spec.hidden, spec.experts.num_experts, spec.experts.width, spec.shared
    return BlockTensors(
        router=matrix(experts, hidden) * 2,
        w13=matrix(experts, 2 * width, hidden),
        w2=matrix(experts, hidden, width),
        shared_gate_proj=matrix(shared.width, hidden) if shared else None,
        shared_up_proj=matrix(shared.width, hidden) if shared else None,
        shared_down_proj=matrix(hidden, shared.width) if shared else None,
        shared_gate=matrix(1, hidden) if shared and shared.gate else None,
        copied=False,
    )


def tokens(spec: MoESpec, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, spec.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


def build(spec: MoESpec = SPEC, dtype: torch.dtype = torch.float32) -> FusedMoEBlock:
    return TARGET.build(spec, weights(spec, dtype), prefix="model.layers.0.mlp")


def worst(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The worst token's relative L2 distance."""
    return float(((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
