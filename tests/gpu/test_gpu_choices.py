"""vLLM's own routers choose experts that exist, whatever they are given, as long as no token is told to be padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from moe_surgery.engine.model.choices import all_chosen_for, always_exist

HIDDEN = 256
GROUPED = {"renormalize": True, "routed_scaling_factor": 1.5}


def grouped(experts: int, groups: int, of: int, top_k: int, **more: Any) -> GroupedTopKRouter:
    bias = torch.randn(experts, device="cuda") / 8
    given = {"scoring_func": "sigmoid", "e_score_correction_bias": bias, **GROUPED, **more}
    return GroupedTopKRouter(top_k, experts, groups, of, **given)


ROUTERS = {
    "grouped": lambda: (grouped(64, 8, 4, 4), 64),
    "grouped, as DeepSeek-V3": lambda: (grouped(256, 8, 4, 8), 256),
    "grouped, one group": lambda: (grouped(160, 1, 1, 8), 160),
    "grouped, as Kimi-K2": lambda: (grouped(384, 1, 1, 8), 384),
    "grouped, wide groups": lambda: (grouped(128, 2, 1, 6), 128),
    "grouped, softmax": lambda: (grouped(64, 8, 4, 4, scoring_func="softmax"), 64),
    "grouped, no bias": lambda: (
        grouped(64, 8, 4, 4, scoring_func="softmax", e_score_correction_bias=None),
        64,
    ),
    "plain": lambda: (FusedTopKRouter(8, 128), 128),
    "plain, sigmoid": lambda: (FusedTopKRouter(8, 128, scoring_func="sigmoid"), 128),
    "plain, 60 experts": lambda: (FusedTopKRouter(4, 60), 60),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_choices_exist(name: str, dtype: torch.dtype) -> None:
    router, experts = ROUTERS[name]()
    assert always_exist(router, HIDDEN, torch.zeros(1, experts, dtype=dtype, device="cuda"))


def test_padding_has_experts_only_while_all_are_chosen_for() -> None:
    """What the kernels that look experts up must not be given: they are given it without this library's care."""
    x, logits = torch.zeros(4, HIDDEN, device="cuda"), torch.randn(4, 128, device="cuda")
    asked = {"hidden_states": x, "router_logits": logits, "topk_indices_dtype": torch.int32}
    padding = torch.tensor([False, False, True, True], device="cuda")
    router = FusedTopKRouter(8, 128)
    with set_forward_context(None, VllmConfig(), is_padding=padding):
        assert (router.select_experts(**asked)[1][2:] < 0).all()
        with all_chosen_for():
            weights, ids = router.select_experts(**asked)
    assert ((ids >= 0) & (ids < 128)).all() and (weights > 0).all()
    alone = router.select_experts(**asked)
    assert torch.equal(ids, alone[1]) and torch.equal(weights, alone[0])
