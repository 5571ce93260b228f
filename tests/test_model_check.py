"""The check of the whole model: what it runs, what it says where it can't, and blocks that nothing can be proven of."""

from __future__ import annotations

import copy
import operator
import threading
from dataclasses import replace
from typing import Any

import pytest
import talking_models as talking
import torch
from talking_models import IDS
from test_apply import picture, sabotage, tiny
from torch import Tensor, nn

import moe_surgery
from moe_surgery.errors import ExpectationError, ProofError
from moe_surgery.models.greedy import greedy_tokens
from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.terminal import model_sentences


def apply(model: nn.Module, **how: Any) -> Any:
    return moe_surgery.apply(model, target="reference", **how)


class Pictures(nn.Module):
    """Takes pictures, which nobody can make up."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        return self.inner(pixels + grid)


def test_a_part_that_cant_be_run_is_named() -> None:
    layer = talking.Layer(talking.Block(), talking.plain)
    model = nn.ModuleDict({"eye": Pictures(layer), "text": talking.model()}).eval()
    check = apply(model).model_check
    assert check.parts == ("text",) and check.tokens == 8 and check.seconds > 0
    lines = model_sentences(check)
    assert lines[0].startswith("text, run on 8 tokens, does the same around the new blocks")
    assert lines[1].startswith("no run came to eye.inner.mlp")
    layer = talking.Layer(talking.Block(), talking.plain)
    alone = apply(nn.ModuleDict({"eye": Pictures(layer)}).eval()).model_check
    assert alone.parts == () and "NOT RUN: the whole model" in model_sentences(alone)[0]


def test_arguments_to_call_a_model_with_can_be_given() -> None:
    layer = talking.Layer(talking.Block(), lambda layer, x: layer.mlp(x) if type(layer.mlp) is talking.Block else x)
    model = Pictures(layer).eval()
    given = {"pixels": torch.randn(1, 5, talking.HIDDEN), "grid": torch.zeros(1)}
    with pytest.raises(ProofError, match="the whole model differs: inner"):
        apply(model, model_check=given)


class Shared(nn.Module):
    """Is asked by another thread, as a server's are, whenever the model is called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.answers: list[Tensor] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = IDS + len(self.answers)
        asked = threading.Thread(target=lambda: self.answers.append(self.inner(ids).detach()))
        asked.start()
        asked.join()
        return self.inner(input_ids)


def test_other_threads_are_answered_and_leave_the_check_alone() -> None:
    model = Shared(talking.model()).eval()
    report = apply(model)
    assert len(report.replaced) == 2 and report.model_check.parts == ("",)
    assert len(model.answers) == 2
    for more, answer in enumerate(model.answers):
        torch.testing.assert_close(answer, model.inner(IDS + more))


class Counted(nn.Module):
    """Counts its tokens, and does something else after the first few."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        self.seen += x.numel()
        return self.inner(x) * (1 + (self.seen > 8))


@pytest.mark.parametrize("undoable", [True, False])
def test_no_run_of_the_check_is_counted_in_a_buffer(undoable: bool) -> None:
    model = Counted(talking.model()).eval()
    report = apply(model, undoable=undoable)
    assert len(report.replaced) == 2 and report.model_check.tokens == 8
    assert not model.seen


PARAMETERS = operator.methodcaller("parameters")  # a name that no code has


@pytest.mark.parametrize("telling", [False, True], ids=["a tensor", "a tuple"])
def test_who_changes_weights_around_a_call_is_noticed_whatever_the_block_returns(telling: bool) -> None:
    model = talking.model(lambda layer, x: layer.mlp(x)[0] if telling else layer.mlp(x))
    if telling:
        model[2].mlp.__class__ = Telling
    assert len(apply(copy.deepcopy(model)).replaced) == 2

    def more(module: Any, _: Any) -> None:
        for p in PARAMETERS(module.mlp):
            p.data.mul_(1.5)

    def less(module: Any, *_: Any) -> None:
        for p in PARAMETERS(module.mlp):
            p.data.div_(1.5)

    model[2].register_forward_pre_hook(more)
    model[2].register_forward_hook(less)
    with pytest.raises(ProofError, match=r"2\.mlp: in the model the old block's output is"):
        apply(model)


class Telling(talking.Block):
    """A block that returns its router's logits too."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.gate(x.reshape(-1, talking.HIDDEN))


def test_a_report_tells_of_the_check_in_json_too() -> None:
    report = apply(tiny(2))
    again = report_from_json(report.to_json()).model_check
    assert again == replace(report.model_check, seconds=round(report.model_check.seconds, 3))
    assert report.to_json()["model_check"]["parts"] == [""]
    assert apply(tiny(2), model_check=False).to_json()["model_check"] is None


def test_outputs_that_arent_numbers_are_equal_to_nothing() -> None:
    model = talking.model(lambda layer, x: layer.mlp(x) * float("nan"))
    check = apply(model).model_check
    assert check.parts == () and "isn't finite" in check.not_run[0][1]
    lm = tiny(2)
    lm.lm_head.weight.data[3] = float("nan")
    assert greedy_tokens(lm, [1, 2], 3) == {"model": [None] * 3}


def test_random_numbers_and_hooks_are_left_alone() -> None:
    model = talking.model(lambda layer, x: layer.mlp(x) + 0 * torch.rand(1))
    state, before = torch.get_rng_state(), picture(model)
    moe_surgery.undo(apply(model))
    assert torch.equal(torch.get_rng_state(), state) and picture(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def dead_experts() -> nn.Sequential:
    """Three layers, of which the last two have an expert that gives zero."""
    model = talking.model(layers=3)
    for layer in model[2:]:
        layer.mlp.experts[4].d.weight.data.zero_()
    return model


def test_what_cant_be_proven_is_refused_and_the_others_are_replaced() -> None:
    model = dead_experts()
    with torch.no_grad():
        before = model(IDS)
    report = apply(model)
    assert [step.outcome for step in report.steps] == ["replaced", "refused", "refused"]
    assert all(step.reason.startswith("can't be proven: the check has no power") for step in report.refused)
    assert all(step.verdict.powerless and not step.verdict.passed for step in report.refused)
    assert report.exit_code == 0
    with torch.no_grad():
        assert torch.allclose(model(IDS), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"strict": True}, {"expect": 3}], ids=str)
def test_strict_names_all_that_cant_be_proven(how: dict[str, Any]) -> None:
    model = dead_experts()
    before = picture(model)
    with pytest.raises(ExpectationError, match=r"(?s)2\.mlp: can't be proven.*3\.mlp: can't be proven") as caught:
        apply(model, **how)
    assert caught.value.exit_code == 11 and caught.value.report is not None
    assert picture(model) == before


def test_a_wrong_block_still_rolls_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dead_experts()
    before = picture(model)
    sabotage(monkeypatch, lambda: "w2", "1.mlp")
    with pytest.raises(ProofError, match=r"^1\.mlp: the new block is not what the spec says"):
        apply(model)
    assert picture(model) == before
