"""Small blocks for the folded target's tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_surgery.spec import ExpertsSpec, Groups, MoESpec, RouterSpec, SharedSpec
from moe_surgery.weights.tensors import BlockTensors

SPEC = MoESpec(
    hidden=64,
    router=RouterSpec(num_experts=8, top_k=2, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=8, width=16, activation="silu"),
    shared=SharedSpec(width=32, activation="silu", gate="sigmoid"),
)


def but(spec: MoESpec = SPEC, *, shared: dict | None = None, experts: dict | None = None, **router: object) -> MoESpec:
    """``spec`` with other values of its parts."""
    assert spec.shared is not None
    return replace(
        spec,
        router=replace(spec.router, **router),
        experts=replace(spec.experts, **(experts or {})),
        shared=replace(spec.shared, **(shared or {})),
    )


SPECS = {
    "plain": SPEC,
    "no shared expert": replace(SPEC, shared=None),
    "ungated, scaled": but(shared={"gate": None, "scale": 0.5}),
    "three slices": but(shared={"width": 48}),
    "sigmoid, scaled": but(scoring="sigmoid", renormalize=False, scale=2.5),
    "not renormalised": but(renormalize=False),
    "top-1": but(top_k=1),
    "all experts": but(top_k=8),
    "float32 router": but(logits_dtype="float32"),
    "relu": but(experts={"activation": "relu"}, shared={"activation": "relu"}),
    "gelu": but(experts={"activation": "gelu"}, shared={"activation": "gelu"}),
    "gelu_tanh": but(experts={"activation": "gelu_tanh"}, shared={"activation": "gelu_tanh"}),
    "sizes that fit no tile": replace(
        but(num_experts=6, top_k=3, experts={"num_experts": 6, "width": 24}, shared={"width": 72}), hidden=80
    ),
}

DEEPSEEK = but(scoring="sigmoid", correction_bias=True, groups=Groups(4, 2, "top2", 0.0), scale=2.5, epsilon=1e-20)
CLAMPED = {"limit": 0.5, "alpha": 1.702, "offset": 1.0}
# What the kernels compute behind a router in torch, or with the shared expert beside them.
ROUTED = {
    "correction bias and groups": DEEPSEEK,
    "best groups by their best": but(correction_bias=True, groups=Groups(2, 1, "max", float("-inf")), top_k=3),
    "groups of three": but(
        num_experts=6, experts={"num_experts": 6}, scoring="sigmoid", groups=Groups(2, 1, "top2", 0.0)
    ),
    "square roots of softplus": but(scoring="sqrtsoftplus", correction_bias=True),
    "normed by squares, floored": but(scoring="sigmoid", norm=2.0, floor=0.7, top_k=3),
    "logits ranked, then sigmoid": but(scoring="sigmoid", ranks="logits", correction_bias=True, logits_dtype="float32"),
    "logit bias and soft cap": but(bias=True, soft_cap=3.0, logits_dtype="float32"),
    "ranked in its own dtype": but(scores_dtype="native", ranked_dtype="native"),
    "biases, clamped, two slices": but(experts={"biases": True, **CLAMPED}, shared=CLAMPED),
    "clamped after": but(experts={"limit": 0.1, "limit_after": True}, shared={"limit": 0.1, "limit_after": True}),
    "ungated": but(experts={"gated": False, "activation": "relu2"}, shared={"gated": False, "activation": "relu2"}),
    "weighted inputs": but(experts={"weights_on": "input"}, scoring="sigmoid", renormalize=False),
    "shared expert of another width": but(shared={"width": 40}),
    "shared expert of another kind": but(shared={"activation": "relu", "scale": 0.5}),
    "identity experts": but(num_experts=10),
    "output bias": replace(SPEC, output_bias=True),
}
# Those of them whose router is a kernel.
ROUTERS = tuple(name for name in ROUTED if name != "ranked in its own dtype")
ROUTED["identity experts"] = replace(
    ROUTED["identity experts"], experts=replace(ROUTED["identity experts"].experts, identities=2)
)


def clear_tokens(spec: MoESpec, tensors: BlockTensors, count: int) -> Tensor:
    """Tokens whose choice of experts no rounding of the logits can change."""
    x = torch.randn(8 * count, spec.hidden, generator=torch.Generator().manual_seed(1)).to(
        tensors.w13.device, tensors.dtype
    )
    if spec.router.top_k < spec.experts.num_experts:
        ranked = (x.double() @ tensors.router.double().T).sort(-1, descending=True).values
        gap = ranked[:, spec.router.top_k - 1] - ranked[:, spec.router.top_k]
        x = x[gap > 8 * torch.finfo(x.dtype).eps * ranked.abs().amax()]
    assert len(x) >= count
    return x[:count]
