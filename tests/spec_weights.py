"""Random weights of a block that a spec describes, and how far a block's outputs may be from right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def weights(spec: MoESpec, dtype: torch.dtype = torch.float32, *, seed: int = 0, device: str = "cpu") -> BlockTensors:
    """Weights that keep the scale of unit tokens (the router's twice that)."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])).to(device, dtype)

    hidden, experts, width, shared = spec.hidden, spec.experts.num_experts, spec.experts.width, spec.shared
    return BlockTensors(
        router=matrix(spec.router.num_experts, hidden) * 2 if spec.at == "block" else matrix(0, hidden),
        w13=matrix(experts, 2 * width if spec.experts.gated else width, hidden),
        w2=matrix(experts, hidden, width),
        shared_gate_proj=matrix(shared.width, hidden) if shared else None,
        shared_up_proj=matrix(shared.width, hidden) if shared and shared.gated else None,
        shared_down_proj=matrix(hidden, shared.width) if shared else None,
        shared_gate=matrix(1, hidden) if shared and shared.gate else None,
        copied=False,
        router_bias=matrix(experts) if spec.router.bias else None,
        correction_bias=matrix(experts) if spec.router.correction_bias else None,
        w13_bias=matrix(experts, 2 * width if spec.experts.gated else width) if spec.experts.biases else None,
        w2_bias=matrix(experts, hidden) if spec.experts.biases else None,
        output_bias=matrix(hidden) if spec.output_bias else None,
    )


def worst(got: Tensor, wanted: Tensor) -> float:
    """The worst token's relative L2 distance."""
    return float(((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def tolerance(spec: MoESpec, dtype: torch.dtype) -> float:
    """Relative L2 error of one token: sums of H + I terms in float32, and some roundings to ``dtype``.

    Rounded are the logits, the weights, each MLP's inner product and the two outputs, each by up to half an eps.
    """
    return math.sqrt(spec.hidden + spec.experts.width) * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps
