"""Whole models' steps, timed while a model generates, with old and new blocks in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_surgery
from moe_surgery.errors import SurgeryError
from moe_surgery.models.opening import load_model
from moe_surgery.operate.transaction import Transaction
from moe_surgery.timing import blocks
from moe_surgery.timing.steps import Steps, measure_steps


@pytest.fixture(scope="module")
def tiny(write_tiny: Callable[[str], Path]) -> nn.Module:
    return load_model(str(write_tiny("float32"))).module


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than five turns."""
    monkeypatch.setattr(blocks, "_SECONDS", 0.0)


def measured(model: nn.Module) -> Steps:
    report = moe_surgery.apply(model, target="reference")
    assert report.transaction is not None
    try:
        return measure_steps(model, report.transaction, sequences=(1, 3), prefill=(7,))
    finally:
        moe_surgery.undo(report)  # raises unless the new blocks are in place


def shapes(steps: Steps) -> list[tuple[str, str, int, int]]:
    return [(s.name, s.what, each.tokens, each.sequences) for s in steps.speeds for each in s.samples]


@pytest.mark.usefixtures("few")
def test_old_and_new_blocks_answer_in_turns(tiny: nn.Module) -> None:
    report = moe_surgery.apply(tiny, target="reference")
    assert report.transaction is not None
    calls: list[tuple[str, torch.Size]] = []
    hooks = []
    last = report.transaction.swaps[-1]
    assert last.old is not None
    for name, block in (("old", last.old), ("new", last.new)):
        hooks.append(block.register_forward_hook(lambda _, x, y, name=name: calls.append((name, x[0].shape[:2]))))
    steps = measure_steps(tiny, report.transaction, sequences=(3,), prefill=(7,))
    for hook in hooks:
        hook.remove()
    moe_surgery.undo(report)
    assert steps.left_out == ()
    assert shapes(steps) == [("model", "decode step", 1, 3), ("model", "prefill", 7, 1)]
    for size in ((3, 1), (1, 7)):
        names = [name for name, shape in calls if shape == size]
        assert len(names) == 2 * (2 + 5)  # two turns to warm up, and five
        assert all(set(pair) == {"old", "new"} for pair in zip(names[::2], names[1::2], strict=True))


@pytest.mark.usefixtures("few")
def test_a_slower_model_is_slower(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a step is that of the blocks that answered it."""
    report = moe_surgery.apply(tiny, target="reference")
    assert report.transaction is not None
    clock = {"now": 0.0}
    monkeypatch.setattr("moe_surgery.timing.steps.now", lambda device: clock["now"])

    def spend(seconds: float) -> Callable[..., None]:
        def hook(*_: object) -> None:
            clock["now"] += seconds

        return hook

    hooks = []
    for swap in report.transaction.swaps:
        assert swap.old is not None
        hooks += [swap.old.register_forward_hook(spend(3.0)), swap.new.register_forward_hook(spend(1.0))]
    steps = measure_steps(tiny, report.transaction, sequences=(1,), prefill=(7,))
    for hook in hooks:
        hook.remove()
    moe_surgery.undo(report)
    assert [sample.ratio for speed in steps.speeds for sample in speed.samples] == pytest.approx([3.0, 3.0])


@pytest.mark.usefixtures("few")
def test_a_talker_and_a_thinker_are_driven_each(omni_dir: Path) -> None:
    model = load_model(str(omni_dir)).module
    steps = measured(model)
    assert steps.left_out == ()
    one = [("decode step", 1, 1), ("decode step", 1, 3), ("prefill", 7, 1)]
    assert shapes(steps) == [(part, *each) for part in ("thinker", "talker") for each in one]
    moe_surgery.undo(moe_surgery.apply(model, target="reference"))  # no hook was left, or it would be refused


@pytest.mark.usefixtures("few")
def test_a_model_that_cant_be_driven_is_left_out_with_the_reason(
    tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("this model wants\npictures")

    monkeypatch.setattr(tiny, "generate", broken)
    assert measured(tiny) == Steps((), ("model: ValueError: this model wants pictures",))
    inner = tiny.model
    assert isinstance(inner, nn.Module)
    [reason] = measured(inner).left_out
    assert reason == f"{type(inner).__name__} has no part that generates tokens"


def test_nothing_replaced_nothing_timed(tiny: nn.Module) -> None:
    assert measure_steps(tiny, Transaction(tiny, [])) == Steps((), ("nothing was replaced",))


@pytest.mark.usefixtures("few")
def test_an_interrupt_leaves_the_new_blocks_in_place(tiny: nn.Module) -> None:
    report = moe_surgery.apply(tiny, target="reference")
    assert report.transaction is not None
    old = report.transaction.swaps[0].old
    assert old is not None

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = old.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_steps(tiny, report.transaction)
    hook.remove()
    moe_surgery.undo(report)
    with pytest.raises(SurgeryError):
        moe_surgery.undo(report)
