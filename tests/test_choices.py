"""Whether a router's choices always exist is told by what it makes of odd logits, and padding is a token meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

from moe_surgery.engine.model.choices import all_chosen_for, always_exist

EXPERTS, HIDDEN, TOP_K = 16, 32, 4


def router(choose: Callable[[Tensor], Tensor]) -> CustomRoutingRouter:
    def routing(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        ids = choose(gating_output)
        return torch.ones(ids.shape), ids

    return CustomRoutingRouter(TOP_K, EXPERTS, routing)


def best(logits: Tensor) -> Tensor:
    return logits.topk(TOP_K, dim=-1)[1]


def told(choose: Callable[[Tensor], Tensor]) -> bool:
    return always_exist(router(choose), HIDDEN, torch.zeros(1, EXPERTS))


def test_choices_that_exist() -> None:
    assert told(best)


@pytest.mark.parametrize("other", [-1, EXPERTS])
@pytest.mark.parametrize(
    "odd",
    [
        lambda logits: logits.isnan().all(-1),
        lambda logits: logits.isnan().any(-1) & ~logits.isnan().all(-1),
        lambda logits: (logits.isnan() & torch.signbit(logits)).any(-1),
        lambda logits: (logits == float("-inf")).all(-1),
        lambda logits: (logits == float("inf")).sum(-1) > TOP_K,
        lambda logits: (logits == 0).all(-1),
    ],
)
def test_choices_that_may_not_exist(odd: Callable[[Tensor], Tensor], other: int) -> None:
    assert not told(lambda logits: torch.where(odd(logits)[:, None], other, best(logits)))


@pytest.mark.parametrize("hidden", [float("-inf"), float("nan")])
def test_a_bias_that_hides_an_expert(hidden: float) -> None:
    with_bias = router(best)
    with_bias.e_score_correction_bias = torch.zeros(EXPERTS)
    assert always_exist(with_bias, HIDDEN, torch.zeros(1, EXPERTS))
    with_bias.e_score_correction_bias[3] = hidden
    assert not always_exist(with_bias, HIDDEN, torch.zeros(1, EXPERTS))


def test_choices_that_someone_is_told() -> None:
    heard = router(best)
    heard.set_capture_fn(lambda ids: pytest.fail("told"))
    assert not always_exist(heard, HIDDEN, torch.zeros(1, EXPERTS))


def test_choices_that_are_mapped() -> None:
    mapped = router(best)
    mapped.eplb_state = SimpleNamespace()
    assert not always_exist(mapped, HIDDEN, torch.zeros(1, EXPERTS))


def test_padding_is_chosen_for_meanwhile() -> None:
    padding = torch.tensor([False, True])
    with set_forward_context(None, VllmConfig(), is_padding=padding):
        try:
            with all_chosen_for():
                assert get_forward_context().is_padding is None
                raise KeyError
        except KeyError:
            assert get_forward_context().is_padding is padding
    with all_chosen_for():
        pass
