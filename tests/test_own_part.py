"""The part of a block that its own operations go on computing: routers that no spec says, results, and attributes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.published import ALL

import moe_surgery
from moe_surgery.errors import ProofError
from moe_surgery.read.program import Builder
from moe_surgery.replay import Begun, Replay
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.targets.own_part import OwnPart

ADD = torch.ops.aten.add.Tensor


class Reader(nn.Module):
    """A model that reads what its block keeps beside its output."""

    def __init__(self, name: str, attribute: str = "") -> None:
        super().__init__()
        self.mlp = next(case for case in ALL if case.name == name).make()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_weights_apply_is_proven_though_most_of_them_are_one(dtype: torch.dtype) -> None:
    model = Reader("MostWeightsAreOne").to(dtype).eval()
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced", step.reason
    assert "weights on the inputs" in {mutant.name for mutant in step.verdict.mutants}


def test_ids_that_stand_for_no_routed_expert_are_told_from_those_that_return_their_input() -> None:
    _, model, report = operated("OfThreeKindsWithoutWeights")
    experts = model.mlp.spec.experts
    assert (experts.num_experts, experts.identities, experts.empty) == (4, 1, 3)
    assert "ids for no routed expert return their input" in {m.name for m in report.steps[0].verdict.mutants}
    assert MoESpec.from_json(model.mlp.spec.to_json()) == model.mlp.spec


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


@pytest.mark.parametrize("undoable", [True, False])
def test_objects_that_calls_write_to_may_have_been_written_to_before(undoable: bool) -> None:
    before, model = Reader("WithADispatcher").eval(), Reader("WithADispatcher").eval()
    with torch.no_grad():
        model(torch.randn(2, 5, 32))
    held = dict(vars(model.mlp.token_dispatcher))
    moe_surgery.apply(model, target="reference", undoable=undoable)
    assert isinstance(model.mlp, SwappedBlock)
    assert all(value is held[name] for name, value in vars(model.mlp.token_dispatcher).items())
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        assert close(before(x), model(x))
    assert torch.equal(model.mlp.token_dispatcher.order, before.mlp.token_dispatcher.order)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("KeepsItsInputsShape", torch.Size),
        ("KeepsItsInputsShapeAsATuple", tuple),
        ("KeepsItsInputsShapePutTogether", torch.Size),
    ],
)
def test_the_shape_of_the_last_input_is_kept_up_to_date(name: str, kind: type) -> None:
    _, model, report = operated(name, "hidden_shape")
    for shape in ((1, 1, 32), (3, 7, 32)):
        with torch.no_grad():
            _, kept = model(torch.randn(shape))
        assert type(kept) is kind and kept == shape
    moe_surgery.undo(report)


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

    def wrong(self: Replay, x: Tensor, *others: Any) -> Begun:
        found = right(self, x, *others)
        floating = (isinstance(value, Tensor) and value.is_floating_point() for value in found.values)
        values = (value * 1.001 if is_so else value for value, is_so in zip(found.values, floating, strict=True))
        return replace(found, values=tuple(values))

    monkeypatch.setattr(Replay, "forward", wrong)
    with pytest.raises(ProofError) as caught:
        operated(name)
    assert "raised" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["NormsOnBothSides", "NormForItsExpertsAlone", "MixedByCoefficients", "SharesWhatIsLeft"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_around_experts_goes_on_as_it_is(name: str, dtype: torch.dtype) -> None:
    before, model = Reader(name).eval().to(dtype), Reader(name).eval().to(dtype)
    [step] = moe_surgery.apply(model).steps
    assert step.outcome == "replaced" and step.spec is not None and step.spec.own_rest, step.reason
    bound = 64 * torch.finfo(dtype).eps
    for shape in ((1, 1, 32), (2, 3, 32), (13, 17, 32), (0, 3, 32), (7, 32)):
        for scale in (0.01, 1.0, 30.0):
            x = (torch.randn(shape) * scale).to(dtype)
            with torch.no_grad():
                one, other = before(x), model(x)
            for mine, its in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
                assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
                # A token on the verge between two experts may go to either; there are few.
                apart = (mine - its).float().norm(dim=-1) / mine.float().norm(dim=-1).clamp_min(1e-30)
                assert apart.numel() == 0 or float((apart > bound).double().mean()) < 0.02, float(apart.max())


@pytest.mark.parametrize("name", ["NormsOnBothSides", "TwoSharedExperts", "MixedByCoefficients"])
def test_what_stands_around_experts_done_wrongly_fails_the_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Begun.finished
    monkeypatch.setattr(OwnPart, "around", lambda self, begun, x, routed: right(begun, routed * 1.001))
    with pytest.raises(ProofError, match="the new block is not what the spec says"):
        operated(name)


@pytest.mark.parametrize("name", ["NormsOnBothSides", "MixedByCoefficients"])
def test_what_stands_around_experts_read_wrongly_fails_the_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Builder.program

    def wrong(self: Builder, *given: Any) -> Any:
        found = right(self, *given)
        last = next(place for place in reversed(range(len(found.steps))) if found.steps[place].func is ADD)
        steps = [*found.steps]
        steps[last] = replace(steps[last], kwargs=(("alpha", 0.99),))
        return replace(found, steps=tuple(steps))

    monkeypatch.setattr(Builder, "program", wrong)
    with pytest.raises(ProofError, match="the old block is not what was read"):
        operated(name)


def test_a_plan_says_that_its_router_is_its_own() -> None:
    [step] = moe_surgery.plan(Reader("ByCosine").eval(), target="reference").steps
    assert step.outcome == "replaced" and step.reason.startswith("its own top-2 of")
