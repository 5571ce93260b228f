"""Blocks that take images, or channels before places: replaced in their own form, or left alone for a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.others import LISTED
from zoo.plain import Base, block_class
from zoo.same import distance

import moe_surgery
from moe_surgery.errors import SurgeryError
from moe_surgery.form import FORMS, Form
from moe_surgery.targets.base import SwappedBlock

ROWS, IMAGES, PLANES = FORMS[:3]
SIZES = ((2, 3, 4, 5), (1, 1, 1, 1), (3, 7, 2, 3))


class Formed(Base):
    """It takes tokens in a ``form``, and nothing else."""

    form: Form

    def forward(self, hidden_states: Tensor) -> Any:
        if hidden_states.ndim != self.form.dimensions:
            raise ValueError(f"an input of {hidden_states.ndim} dimensions")
        tokens = hidden_states.movedim(1, -1) if self.form.first else hidden_states
        out = self.done(tokens, self.rows(tokens)).reshape(tokens.shape)
        return self.handed_back(tokens, out.movedim(-1, 1) if self.form.first else out)

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, tokens.shape[-1])

    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        return self.combine(x, self.routed(x, *self.route(x)), self.shared(x))

    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        return out


class RunsInOthers(Formed):
    """Its code runs in any form of as many dimensions, and makes no tokens of that."""

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, self.hidden)


class WithLogits(Formed):
    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        return out, self.logits(tokens.reshape(-1, self.hidden))


class KeepsALoss(Formed):
    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        self.loss = self.logits(tokens.reshape(-1, self.hidden)).softmax(-1).mean(0).square().sum()
        return out


class KeepsItsShape(Formed):
    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        self.input_shape = out.shape
        return out


class ByCosine(Formed):
    """A router that goes on being computed by the block's own operations."""

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.gate.weight, dim=-1).T * 20


class KeepsLoadsOfRows(ByCosine):
    """What it keeps has a number for each row of an image."""

    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        self.rows_loads = self.logits(tokens).softmax(-1).mean(2)
        return out


class ScalesByColumns(ByCosine):
    columns = 1

    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        self.columns = tokens.shape[-2]
        return super().done(tokens, x)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) * self.columns


class LooksAlongColumns(Formed):
    """A token's experts are those of all tokens of its row and column."""

    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        told = tokens + tokens.mean(1, keepdim=True)
        weights, ids = self.route(nn.functional.normalize(told.reshape(x.shape), dim=-1) * 5)
        return self.combine(x, self.routed(x, weights, ids), self.shared(x))


class MixesColumns(Formed):
    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        return super().done(tokens, (tokens - tokens.mean(-2, keepdim=True)).reshape(x.shape))


class RollsRows(Formed):
    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        return super().done(tokens, tokens.roll(1, 1).reshape(x.shape))


class AsksForColumns(Formed):
    def done(self, tokens: Tensor, x: Tensor) -> Tensor:
        return super().done(tokens, x) * (2.0 if tokens.shape[-2] > 11 else 1.0)


class AsksWhetherContiguous(Formed):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states) * (1.0 if hidden_states.is_contiguous() else 2.0)


class AsksForAMemoryFormat(Formed):
    def forward(self, hidden_states: Tensor) -> Any:
        last = hidden_states.is_contiguous(memory_format=torch.channels_last) and not hidden_states.is_contiguous()
        return super().forward(hidden_states) * (2.0 if last else 1.0)


class InAnotherForm(Formed):
    def handed_back(self, tokens: Tensor, out: Tensor) -> Any:
        return out.transpose(1, 2).contiguous()


class Model(nn.Module):
    def __init__(self, cls: type[Formed], form: Form) -> None:
        super().__init__()
        self.mlp = plain.make(block_class(cls, *LISTED, name=cls.__name__)).eval()
        self.mlp.form = form

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


def inputs(form: Form) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(*sizes[: form.places + 1], plain.SIZES.hidden) for sizes in SIZES]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.movedim(-1, 1).contiguous() if form.first else x for x in made]


def answers(model: nn.Module, form: Form) -> list[tuple[Any, ...]]:
    with torch.no_grad():
        found = [model(x) for x in inputs(form)]
    return [answer if isinstance(answer, tuple) else (answer,) for answer in found]


def assert_replaced(cls: type[Formed], form: Form) -> Model:
    model = Model(cls, form)
    before = answers(model, form)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": inputs(form)[0]}).steps
    assert (step.path, step.outcome) == ("mlp", "replaced"), step.reason
    assert isinstance(model.mlp, SwappedBlock)
    for old, new in zip(before, answers(model, form), strict=True):
        for one, other in zip(old, new, strict=True):
            assert one.shape == other.shape and distance(other, one) < 64
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_block_is_replaced_in_the_form_that_it_takes(form: Form) -> None:
    assert_replaced(Formed, form)


@pytest.mark.parametrize(
    ("cls", "form"),
    [(RunsInOthers, PLANES), (WithLogits, PLANES)] + [(c, f) for c in (KeepsALoss, ByCosine) for f in FORMS[:3]],
)
def test_what_it_returns_and_keeps_is_that_of_its_tokens(cls: type[Formed], form: Form) -> None:
    model = assert_replaced(cls, form)
    if cls is KeepsALoss:
        old = Model(cls, form)
        answers(model, form), answers(old, form)
        torch.testing.assert_close(model.mlp.loss, old.mlp.loss)


@pytest.mark.parametrize("form", [IMAGES, PLANES], ids=str)
@pytest.mark.parametrize("cls", [MixesColumns, RollsRows, AsksForColumns, InAnotherForm])
def test_what_mixes_places_or_answers_in_another_form_is_left_alone(cls: type[Formed], form: Form) -> None:
    model = Model(cls, form)
    before = answers(model, form)
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "missed" and not isinstance(model.mlp, SwappedBlock)
    assert "it takes an input" not in step.reason or cls is InAnotherForm
    assert all(
        torch.equal(a, b)
        for old, new in zip(before, answers(model, form), strict=True)
        for a, b in zip(old, new, strict=True)
    )


@pytest.mark.parametrize(
    ("cls", "form"),
    [*((AsksWhetherContiguous, form) for form in (ROWS, IMAGES, PLANES)), (AsksForAMemoryFormat, PLANES)],
)
def test_what_asks_how_its_input_lies_in_memory_is_left_alone(cls: type[Formed], form: Form) -> None:
    [step] = moe_surgery.apply(Model(cls, form), target="reference").steps
    assert step.outcome == "missed" and ("differently" in step.reason or "memory format" in step.reason)


def test_operations_of_its_own_know_the_places_of_every_call() -> None:
    model, old = assert_replaced(KeepsLoadsOfRows, IMAGES), Model(KeepsLoadsOfRows, IMAGES)
    for x in inputs(IMAGES):
        with torch.no_grad():
            model(x), old(x)
        assert model.mlp.rows_loads.shape == old.mlp.rows_loads.shape
        torch.testing.assert_close(model.mlp.rows_loads, old.mlp.rows_loads)


@pytest.mark.parametrize("form", [IMAGES, PLANES], ids=str)
def test_a_router_that_looks_at_other_places_is_left_alone(form: Form) -> None:
    [step] = moe_surgery.apply(Model(LooksAlongColumns, form), target="reference").steps
    assert step.outcome == "missed" and "looks at other tokens of the batch" in step.reason


def test_a_router_that_calculates_with_a_side_is_left_alone() -> None:
    [step] = moe_surgery.apply(Model(ScalesByColumns, IMAGES), target="reference").steps
    assert step.outcome == "missed" and "it calculates with the batch size" in step.reason


@pytest.mark.parametrize("form", [ROWS, IMAGES, PLANES], ids=str)
def test_what_keeps_the_shape_of_its_input_in_another_form_is_left_alone(form: Form) -> None:
    [step] = moe_surgery.apply(Model(KeepsItsShape, form), target="reference").steps
    assert step.outcome == "missed" and f"it keeps the shape of its input {form}" in step.reason


def test_another_form_is_an_error() -> None:
    model = assert_replaced(Formed, PLANES)
    for shape in ((2, 3, 32), (6, 32), (2, 32, 3, 2, 2)):
        with pytest.raises(SurgeryError, match="hidden_states"):
            model(torch.randn(shape))
