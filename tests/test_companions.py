"""Blocks that take a tensor beside their input: replaced by what takes it too, or left alone for a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.beside import LEFT, TAKEN, ByTokenIds, MaskedByTruth, RoutedByCentroids
from zoo.same import distance

import moe_surgery
from moe_surgery.errors import ProofError, SurgeryError
from moe_surgery.replay import Replay
from moe_surgery.targets.base import SwappedBlock


class Telling(nn.Module):
    """A model that gives its block what this makes of the input, if the block takes more."""

    def __init__(self, kind: type[Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mlp, self.told = plain.make(kind).to(dtype), getattr(kind, "told", None)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x) if self.told is None else self.mlp(x, self.told(x))


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, 32, generator=generator).to(dtype) for shape in ((2, 3), (1, 1), (5, 13))]


def answers(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in batches(dtype)]


@pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.__name__)
def test_what_is_given_beside_the_input_goes_where_it_went(kind: type[Any]) -> None:
    model = Telling(kind)
    before = answers(model)
    x = torch.randn(2, 3, 32)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": x}).steps
    assert step.outcome == "replaced", step.reason
    assert isinstance(model.mlp, SwappedBlock)
    for one, other in zip(before, answers(model), strict=True):
        assert distance(other, one) < 64


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_what_mixes_tokens_or_is_of_no_known_form_is_left_alone(kind: type[Any]) -> None:
    model = Telling(kind)
    before = answers(model)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": torch.randn(2, 3, 32)}).steps
    assert step.outcome in ("missed", "refused") and LEFT[kind] in step.reason, step.reason
    assert all(torch.equal(one, other) for one, other in zip(before, answers(model), strict=True))


def test_another_form_is_an_error() -> None:
    x = torch.randn(2, 3, 32)
    model = Telling(MaskedByTruth)
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced"
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(model.mlp(x, mask), model.mlp(hidden_states=x, mask=mask.long()))
    for wrong in (None, mask[..., None], mask.float(), mask[:1], True):
        with pytest.raises(SurgeryError, match="a value for mask that it was not read with"):
            model.mlp(x, wrong)
    model = Telling(RoutedByCentroids)
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced"
    with pytest.raises(SurgeryError, match="centroid"):
        model.mlp(x)


def test_what_is_given_beside_the_input_may_lie_anyhow_in_memory() -> None:
    model = Telling(MaskedByTruth)
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced"
    x = torch.randn(2, 3, 32)
    mask = MaskedByTruth.told(x)
    turned = mask.T.contiguous().T
    assert not turned.is_contiguous() and torch.equal(model.mlp(x, mask), model.mlp(x, turned))


def test_a_model_that_gives_another_form_is_refused() -> None:
    model = Telling(MaskedByTruth)
    model.told = lambda x: MaskedByTruth.told(x)[..., None]
    before = answers(model)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": torch.randn(2, 3, 32)}).steps
    assert step.outcome == "refused" and "mask" in step.reason
    assert all(torch.equal(one, other) for one, other in zip(before, answers(model), strict=True))


def test_a_model_that_gives_another_dtype_is_asked_for_it() -> None:
    model = Telling(MaskedByTruth)
    model.told = lambda x: MaskedByTruth.told(x).to(x.dtype)
    before = answers(model)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": torch.randn(2, 3, 32)}).steps
    assert step.outcome == "replaced", step.reason
    for one, other in zip(before, answers(model), strict=True):
        assert distance(other, one) < 64
    with pytest.raises(SurgeryError, match="a value for mask"):
        model.mlp(x := torch.randn(2, 3, 32), MaskedByTruth.told(x))


@pytest.mark.parametrize("kind", [MaskedByTruth, ByTokenIds])
def test_a_block_that_ignores_what_the_model_gives_fails_the_check(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Replay.forward
    monkeypatch.setattr(Replay, "forward", lambda self, x, beside=None, sides=None: right(self, x))
    model = Telling(kind)
    block = model.mlp
    with pytest.raises(ProofError, match="on the model's own tokens"):
        moe_surgery.apply(model, target="reference", model_check={"x": torch.randn(4, 9, 32)})
    assert model.mlp is block


def test_in_half_precision_and_by_kernels() -> None:
    for kind in (MaskedByTruth, ByTokenIds):
        model = Telling(kind, torch.bfloat16)
        before = answers(model, torch.bfloat16)
        assert moe_surgery.apply(model).steps[0].outcome == "replaced"
        for one, other in zip(before, answers(model, torch.bfloat16), strict=True):
            assert distance(other, one) < 64
