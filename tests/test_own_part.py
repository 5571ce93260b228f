"""The part of a block that its own operations go on computing: routers that no spec says, results, and attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import others

import moe_surgery
from moe_surgery.errors import ProofError
from moe_surgery.replay import Replay
from moe_surgery.targets.base import SwappedBlock


class Reader(nn.Module):
    """A model that reads what its block keeps beside its output."""

    def __init__(self, name: str, attribute: str = "") -> None:
        super().__init__()
        self.mlp = next(case for case in others.CASES if case.name == name).make()
        self.attribute = attribute

    def forward(self, x: Tensor) -> Any:
        answer = self.mlp(x)
        return (answer, eval(f"self.mlp.{self.attribute}")) if self.attribute else answer


def operated(name: str, attribute: str = "", target: str = "reference") -> tuple[Reader, Reader, Any]:
    before, model = Reader(name, attribute).eval(), Reader(name, attribute).eval()
    report = moe_surgery.apply(model, target=target)
    assert isinstance(model.mlp, SwappedBlock), report.steps[0].reason
    return before, model, report


def close(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, attribute",
    [("RemembersItsLoss", "aux_loss"), ("RemembersItsChoice", "last"), ("ItsRouterRemembers", "gate.last_logits")],
)
@pytest.mark.parametrize("undoable", [True, False])
def test_attributes_are_kept_up_to_date(name: str, attribute: str, undoable: bool) -> None:
    before, model = Reader(name, attribute).eval(), Reader(name, attribute).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        model(x)
    held = eval(f"model.mlp.{attribute}")
    report = moe_surgery.apply(model, target="reference", undoable=undoable)
    assert isinstance(model.mlp, SwappedBlock), report.steps[0].reason
    assert eval(f"model.mlp.{attribute}") is held  # no call of the check is to be seen
    for shape in ((1, 1, 32), (3, 7, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            for one, other in zip(before(x), model(x), strict=True):
                assert close(one, other)
    if undoable:
        moe_surgery.undo(report)
        assert eval(f"model.mlp.{attribute}") is held


@pytest.mark.parametrize(
    "name",
    [
        "ByCosine",
        "ByAnMLP",
        "ByAttentionBetweenExperts",
        "ScaledByExpert",
        "BiasInTheWeights",
        "InGroupsOfItsOwn",
    ],
)
@pytest.mark.parametrize("target", ["reference", "auto"])
def test_a_router_that_no_spec_says_runs_as_it_is(name: str, target: str) -> None:
    before, model, report = operated(name, target=target)
    assert report.steps[0].spec is not None and report.steps[0].spec.router.own
    for shape in ((1, 1, 32), (2, 3, 32), (13, 17, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            one, other = before(x), model(x)
        for mine, its in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
            assert mine.shape == its.shape and close(mine, its)


@pytest.mark.parametrize("name", ["ByCosine", "RemembersItsLoss", "WithMeanOfLogits"])
def test_what_is_computed_again_wrongly_fails_the_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Replay.forward

    def wrong(self: Replay, x: Tensor, *more: Any) -> dict[str, Tensor]:
        found = right(self, x, *more)
        return {name: value * 1.001 if value.is_floating_point() else value for name, value in found.items()}

    monkeypatch.setattr(Replay, "forward", wrong)
    with pytest.raises(ProofError):
        operated(name)


def test_a_plan_says_that_its_router_is_its_own() -> None:
    [step] = moe_surgery.plan(Reader("ByCosine").eval(), target="reference").steps
    assert step.outcome == "replaced" and step.reason.startswith("its own top-2 of")
