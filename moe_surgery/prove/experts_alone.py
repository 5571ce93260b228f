"""Proving a module of experts alone: a router made up for the proof turns it into a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.formula import weighted
from moe_surgery.weights.tensors import BlockTensors

_MOST = 4


def behind_a_router(
    spec: MoESpec, tensors: BlockTensors, seed: int, *modules: Callable[..., Tensor]
) -> tuple[MoESpec, BlockTensors, tuple[Callable[[Tensor], Tensor], ...]]:
    """``modules`` of experts as blocks, which all ask the same router, with the spec and tensors of such a block."""
    total = spec.experts.acting
    router = RouterSpec(total, min(_MOST, total), "sigmoid", False, scale=spec.router.scale, logits_dtype="float32")
    generator = torch.Generator("cpu").manual_seed(seed)
    weight = torch.randn(total, spec.hidden, generator=generator, device="cpu") / spec.hidden**0.5
    weight = weight.to(tensors.w13.dtype).to(tensors.w13.device)

    def block(module: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def ask(x: Tensor) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            scores = F.linear(flat.float(), weight.float()).sigmoid()
            ids = scores.topk(router.top_k, -1).indices
            y = module(flat, ids, weighted(replace(router, scale=1.0), scores, ids))
            return y.reshape(x.shape) if isinstance(y, Tensor) and y.numel() == x.numel() else y

        return ask

    whole = replace(spec, at="block", router=router)
    return whole, replace(tensors, router=weight), tuple(map(block, modules))
