"""Near misses: after ``apply`` every block does what it did, replaced or not, and what is left alone says why."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import counting as counting  # which adds to the near misses
from zoo import nearmiss, plain
from zoo.same import FEW, SHAPES, TOLERANCE, Holder, assert_reads_right, distance, outputs

import moe_surgery
from moe_surgery import verbs
from moe_surgery.planning.survey import Surveyed, survey
from moe_surgery.read.block import read, read_around
from moe_surgery.read.reading import Unreadable
from moe_surgery.report.outcomes import Step
from moe_surgery.targets.base import SwappedBlock

GENERIC = Path(__file__).parent.parent / "rules" / "generic.toml"


def operate(model: nn.Module) -> Step:
    """Apply the reference target to whatever can be read; the step of the model's only site."""
    report = moe_surgery.apply(model, target="reference", packs=[GENERIC])
    assert [step.path for step in report.steps] == ["mlp"]
    return report.steps[0]


def assert_same_outputs(before: list[Any], after: list[Any], replaced: bool) -> None:
    for one, other in zip(before, after, strict=True):
        if not isinstance(one, torch.Tensor):
            assert isinstance(other, type(one))
        elif replaced:
            assert distance(other, one) < TOLERANCE
        else:
            assert torch.equal(one, other)


@pytest.fixture
def surveyed(monkeypatch: pytest.MonkeyPatch) -> list[Surveyed]:
    """The sites that ``apply`` reads, as it read them: reading them again would take as long as all the rest."""
    found: list[Surveyed] = []

    def kept(model: nn.Module) -> list[Surveyed]:
        found[:] = survey(model)
        return found

    monkeypatch.setattr(verbs, "survey", kept)
    return found


@pytest.mark.parametrize("case", nearmiss.CASES, ids=str)
def test_a_near_miss_is_replaced_by_its_equal_or_left_alone(case: nearmiss.Case, surveyed: list[Surveyed]) -> None:
    shapes = FEW if case.words else SHAPES  # what isn't replaced can't do otherwise
    before = outputs(Holder(case.make()), shapes=shapes)  # of one that is thrown away: some change when called
    block = case.make()
    model = Holder(block)
    step = operate(model)
    [found] = surveyed
    if isinstance(case.make(), nearmiss.BranchInOwnRouter):
        assert step.outcome == "missed", "what it does for other sizes can't be seen"
    # Where only its router can't be read, that runs as it is, in front of other experts.
    around = found.reading.around if found.reading is not None and found.reading.spec.router.own else ""
    if around:
        assert step.outcome in ("replaced", "refused"), step.reason
        assert any(word in around for word in case.words), around
    elif case.words:
        assert step.outcome in ("missed", "refused")
        assert any(word in step.reason for word in case.words), step.reason
        assert model.mlp is block
    else:
        assert step.outcome == "replaced"
        assert isinstance(model.mlp, SwappedBlock)
    assert_same_outputs(before, outputs(model, shapes=shapes), replaced=isinstance(model.mlp, SwappedBlock))


@pytest.mark.parametrize(
    "name", ["CountsInADeque", "CountsInACounter", "CountsInASlot", "CountsInAnObjectOfAList", "CountsFarDown"]
)
def test_reading_leaves_what_a_block_counted_as_it_was(name: str) -> None:
    block = nearmiss.case(name).make()
    before, held = copy.deepcopy(block.held), block.held
    with pytest.raises(Unreadable, match="state"):
        read(block)
    assert block.held is held
    assert pickle.dumps(block.held) == pickle.dumps(before)


def test_reading_leaves_what_is_outside_of_a_block_as_it_was() -> None:
    for name in ("CountsInADefault", "CountsInAFunction", "CountsInAnotherClass", "CountsInAModule"):
        block = nearmiss.case(name).make()
        first = block.counted()
        with pytest.raises(Unreadable, match="state"):
            read(block)
        assert block.counted() == first + 1


def test_a_model_of_no_experts_is_missed_for_what_it_is() -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_local_experts=0
    )
    with torch.device("meta"):
        [found] = survey(transformers.MixtralForCausalLM(config).eval())
    assert found.unread == "its weights have no elements, as of a model with no experts"


def test_there_are_many_of_them() -> None:
    assert len({case.name for case in nearmiss.CASES}) == len(nearmiss.CASES) > 200
    assert sum(bool(case.words) for case in nearmiss.CASES) > 160


def test_only_the_plain_one_of_many_layers_is_replaced() -> None:
    cases = [nearmiss.case(name) for name in ("FirstTokenSpecial", "CapacityOf64", "BranchAbove64", "hook")]
    blocks = [plain.make(plain.block_class()), *(case.make() for case in cases), plain.make(plain.block_class(), 1)]
    model = nn.Sequential(*map(Holder, blocks))
    before = outputs(model)
    report = moe_surgery.apply(model, target="reference")
    assert [step.outcome for step in report.steps] == ["replaced", *["missed"] * 4, "replaced"]
    assert_same_outputs(before, outputs(model), replaced=True)
    assert [step.reason for step in moe_surgery.scan(model).kept] == ["already fused"] * 2
    moe_surgery.undo(report)
    assert [holder.mlp for holder in model] == blocks
    assert_same_outputs(before, outputs(model), replaced=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cant_be_proven_leave_the_model_alone(value: float) -> None:
    block: Any = plain.make(plain.block_class())
    block.down_proj[3] = value
    model = Holder(block)
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "refused" and "finite" in step.reason
    assert model.mlp is block


# Combinations: any spelling, any sizes, up to two changes.

DRAWN_SIZES = [
    plain.Sizes(experts=4),
    plain.Sizes(experts=3, k=1),
    plain.Sizes(experts=5, k=3, width=24, shared=40),
    plain.Sizes(hidden=16, experts=4, k=4, width=8, shared=8),
]
READABLE = [case.cls for case in nearmiss.CASES if case.cls is not None and not case.words]
UNREADABLE = [case.cls for case in nearmiss.CASES if case.cls is not None and case.words]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[str, nn.Module, int]:
    """A name, a block, and its hidden size."""
    changes = draw(st.lists(st.sampled_from(READABLE), max_size=2, unique=True))
    changes += draw(st.lists(st.sampled_from(UNREADABLE), max_size=1))
    parts = [draw(st.sampled_from(options)) for options in (plain.ACTS, plain.FORWARDS) if draw(st.booleans())]
    parts += [
        draw(st.sampled_from(options)) for options in (plain.ROUTERS, plain.STORES, plain.DISPATCHES, plain.SHAREDS)
    ]
    sizes = draw(st.sampled_from(DRAWN_SIZES))
    chosen = [*changes, *parts]
    name = ", ".join(part.__name__ for part in chosen) + f" {sizes}"
    cls = plain.block_class(*chosen)
    return name, plain.make(lambda: cls(sizes), draw(st.integers(0, 9))), sizes.hidden


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(blocks())
def test_combinations_are_never_read_wrong(found: tuple[str, nn.Module, int]) -> None:
    _, block, hidden = found
    try:
        reading = read(block)
    except Unreadable as error:
        assert str(error)
        return
    assert_reads_right(block, reading, hidden)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(blocks())
def test_combinations_split_behind_their_router_are_right(found: tuple[str, nn.Module, int]) -> None:
    _, block, hidden = found
    with suppress(Unreadable):
        read_around(block)
        x = torch.randn(3, 7, hidden, generator=torch.Generator().manual_seed(0))
        model = Holder(block)
        try:
            before = model(x)
        except RuntimeError:  # it takes rows alone
            x = x.flatten(0, 1)
            before = model(x)
        moe_surgery.apply(model, target="reference", model_check=False)
        assert_same_outputs([before], [model(x)], replaced=isinstance(model.mlp, SwappedBlock))
