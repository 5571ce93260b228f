"""Ids of no expert that a module of experts alone is called with: those beyond its experts, and those below zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.plain import SIZES
from zoo.same import distance

import moe_surgery
from moe_surgery.targets.base import SwappedBlock


class Looping(nn.Module):
    """A token goes to those experts whose number is among its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.first = plain.parameter(SIZES.experts, SIZES.hidden, SIZES.width)
        self.last = plain.parameter(SIZES.experts, SIZES.width, SIZES.hidden)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(SIZES.experts):
            rows, place = torch.where(ids == number)
            done = torch.relu(x[rows] @ self.first[number]) @ self.last[number]
            out.index_add_(0, rows, done * weights[rows, place, None])
        return out


class Gathering(Looping):
    """A token's experts are looked up by its ids: one of -1 is the last expert."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("th,tkhi->tki", x, self.first[ids]))
        return torch.einsum("tki,tkih,tk->th", inner, self.last[ids], weights)


class Block(nn.Module):
    """It routes in a way that can't be read."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(SIZES.hidden, SIZES.experts), experts

    def forward(self, hidden_states: Tensor, none: int = 0) -> Tensor:
        x = hidden_states.reshape(-1, SIZES.hidden)
        weights, ids = self.gate(x).softmax(-1).topk(SIZES.k, -1)
        if weights.sum() > 1e9:
            weights = weights * 2
        return self.experts(x, ids, weights).view(hidden_states.shape)


def swapped(kind: type[Looping], target: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    old, model = kind(), nn.Sequential(Block(kind())).eval()
    [step] = moe_surgery.apply(model, target=target).steps
    new = model[0].experts
    assert step.path == "0.experts" and isinstance(new, SwappedBlock), step.reason
    old.load_state_dict(new.state_dict())
    return old.eval(), new


def called(module: nn.Module, ids: Tensor) -> Tensor:
    x = torch.randn(len(ids), SIZES.hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out: Tensor = module(x, ids, torch.full(ids.shape, 0.5))
    return out


@pytest.mark.parametrize("target", ["reference", "vllm"])
@pytest.mark.parametrize("none", [-1, -7, SIZES.experts, SIZES.experts + 5])
def test_an_id_of_none_stands_for_none(target: str, none: int) -> None:
    old, new = swapped(Looping, target)
    ids = torch.tensor([[0, 3], [none, 2], [5, none], [none, none]])
    after, before = called(new, ids), called(old, ids)
    assert distance(after[:3], before[:3]) < 64 and not after[3].any() and not before[3].any()


@pytest.mark.parametrize("target", ["reference", "vllm"])
def test_an_id_that_counts_from_the_last_expert_is_an_error(target: str) -> None:
    old, new = swapped(Gathering, target)
    ids = torch.tensor([[0, 3], [7, 2]])
    assert distance(called(new, ids), called(old, ids)) < 64
    ids[1, 0] = -1
    called(old, ids)
    with pytest.raises(RuntimeError, match="an id below zero"):
        called(new, ids)


class PassingOn(Looping):
    """A token that goes to no expert is as it was."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        goes = (ids < SIZES.experts).any(-1, keepdim=True)
        return torch.where(goes, super().forward(x, ids, weights), x)


def test_experts_that_pass_on_a_token_of_none_are_left_alone() -> None:
    model = nn.Sequential(Block(PassingOn())).eval()
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "missed" and not isinstance(model[0].experts, SwappedBlock), step
