"""Blocks that can do without a mask, of models that give one: taken as the model calls them, and never ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.beside import Alone
from zoo.same import distance

import moe_surgery
from moe_surgery.companion import Companion, twins
from moe_surgery.errors import SurgeryError
from moe_surgery.report.html import page


class MayBeMasked(Alone):
    """Masked tokens come to nothing."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, scale: float | None = None) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        if attention_mask is not None:
            weights = weights * self.seen(attention_mask).reshape(-1, 1).to(weights.dtype)
        out = self.routed(x, weights, ids).view(hidden_states.shape)
        return out if scale is None else out * scale

    def seen(self, mask: Tensor) -> Tensor:
        return mask


class ByMaskedScores(MayBeMasked):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        scale = 1.0 if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = (self.logits(hidden_states) * scale).reshape(len(x), -1).softmax(-1).topk(self.top_k, dim=-1)
        return self.routed(x, weights, ids).view(hidden_states.shape)


class MasksItsOutput(MayBeMasked):
    """What is made up for a proof masks no expert's tokens all."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        out = self.routed(x, *self.route(x)).view(hidden_states.shape)
        return out if attention_mask is None else out * attention_mask[..., None].to(out.dtype)


class SharedOut(MayBeMasked):
    def seen(self, mask: Tensor) -> Tensor:
        return mask / mask.sum()


class TheTokenBefore(MayBeMasked):
    def seen(self, mask: Tensor) -> Tensor:
        return mask.roll(1, 1)


class AsksForAny(MayBeMasked):
    def seen(self, mask: Tensor) -> Tensor:
        return mask if mask.any() else mask + 1


class Rows(MayBeMasked):
    def seen(self, mask: Tensor) -> Tensor:
        return mask[:, None].expand(mask.shape[0], 5)


def told(x: Tensor) -> Tensor:
    return torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]) % 3 > 0


class Model(nn.Module):
    """A model that gives its block ``more`` of what the input makes, in each of its calls of it."""

    def __init__(self, kind: type[Any], *more: Any) -> None:
        super().__init__()
        self.mlp, self.more = plain.make(kind), more
        self.eval()

    def forward(self, x: Tensor) -> Any:
        for more in self.more:
            x = x + self.mlp(x, **more(x))
        return x


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def applied(model: nn.Module) -> Any:
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": X}).steps
    return step


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [MayBeMasked, MasksItsOutput, ByMaskedScores])
def test_a_mask_that_the_model_gives_goes_where_it_went(kind: type[Any], dtype: torch.dtype) -> None:
    def more(x: Tensor) -> dict[str, Any]:
        return {"attention_mask": told(x).to(dtype)}

    model, old = Model(kind, more), Model(kind, more)
    step = applied(model)
    assert step.outcome == "replaced", step.reason
    assert step.reason == step.spec.sentence() and step.spec.router.own
    for shape in ((2, 5), (1, 1), (4, 9)):
        x = torch.randn(*shape, 32)
        assert distance(model(x), old(x)) < 64
    for given in (
        {},
        {"attention_mask": None},
        {"attention_mask": told(X)[..., None]},
        {"attention_mask": told(X)[:1]},
    ):
        with pytest.raises(SurgeryError, match="attention_mask"):
            model.mlp(X, **given)
    if kind is MayBeMasked:
        with pytest.raises(SurgeryError, match="scale"):
            model.mlp(X, told(X).to(dtype), 2.0)


def test_the_proof_alone_is_of_the_block_with_its_mask_too() -> None:
    model = Model(MayBeMasked, lambda x: {"attention_mask": told(x)})
    before = dict(model.named_modules())
    report = moe_surgery.verify(model, target="reference", model_check={"x": X})
    [step] = report.steps
    assert step.outcome == "replaced" and step.verdict.passed and step.spec.router.own
    assert report.model_check is None and dict(model.named_modules()) == before
    [without] = moe_surgery.verify(model, target="reference", model_check=False).steps
    assert not without.spec.router.own
    odd = Model(Rows, lambda x: {"attention_mask": told(x)[:, 0]})
    [refused] = moe_surgery.verify(odd, target="reference", model_check={"x": X}).steps
    assert refused.outcome == "refused" and "attention_mask" in refused.reason


def test_a_block_that_gets_no_mask_is_read_without_one() -> None:
    model = Model(MayBeMasked, lambda x: {})
    plan = moe_surgery.plan(model, target="reference")
    said = "attention_mask and scale at None; "
    said += "given a tensor there by the model, apply reads it again or leaves it alone"
    assert plan.steps[0].reason == f"{plan.steps[0].spec.sentence()} · {said}" and said in " ".join(str(plan).split())
    assert said in page(plan.report()).partition("The whole record")[0]
    step = applied(model)
    assert step.outcome == "replaced" and not step.spec.router.own
    with pytest.raises(SurgeryError, match="attention_mask"):
        model.mlp(X, told(X))


LEFT: dict[str, tuple[type[Any], tuple[Any, ...]]] = {
    "shared out": (SharedOut, (lambda x: {"attention_mask": told(x)},)),
    "token before": (TheTokenBefore, (lambda x: {"attention_mask": told(x)},)),
    "asked for any": (AsksForAny, (lambda x: {"attention_mask": told(x)},)),
    "of rows": (Rows, (lambda x: {"attention_mask": told(x)[:, 0]},)),
    "with and without": (MayBeMasked, (lambda x: {"attention_mask": told(x)}, lambda x: {})),
    "without and with": (MayBeMasked, (lambda x: {}, lambda x: {"attention_mask": told(x)})),
    "two more": (MayBeMasked, (lambda x: {"attention_mask": told(x), "scale": 2.0},)),
    "a number": (MayBeMasked, (lambda x: {"scale": 2.0},)),
    "two dtypes": (
        MayBeMasked,
        (lambda x: {"attention_mask": told(x)}, lambda x: {"attention_mask": told(x).to(torch.int32)}),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cant_be_told_of_one_token_is_left_alone(name: str) -> None:
    kind, more = LEFT[name]
    model = Model(kind, *more)
    before = model(X)
    step = applied(model)
    assert step.outcome == "refused" and "the model calls it with a value for" in step.reason
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_twin_is_the_nearest_token_that_is_masked_otherwise(dtype: torch.dtype) -> None:
    x = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x *= torch.logspace(-3, 3, len(x), dtype=dtype)[:, None]
    near = twins(x)
    for mask in (Companion("mask", "tokens", torch.bool), Companion("mask", "tokens")):
        assert ((mask.made(x) != 0) ^ (mask.made(near) != 0)).all()
        assert 0.4 < (mask.made(x) != 0).float().mean() < 0.6
    assert torch.equal(near[:, 1:], x[:, 1:])
    assert ((near - x).abs() <= x.abs() * 2**-6).all()
    assert torch.equal(twins(torch.zeros(1, 4, dtype=dtype)), torch.zeros(1, 4, dtype=dtype))
