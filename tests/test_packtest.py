"""The test case for packs: it passes for a right pack, and each of its tests fails where it must."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from moe_surgery import verbs
from moe_surgery.packs.file import parse_pack
from moe_surgery.targets.reference_target import ReferenceTarget
from moe_surgery.testing import PackTest, build, outputs

PACK = b"""
[pack]
name = "mine"
version = "1"
[[rule]]
name = "decoder"
find.path = "model.layers.*.mlp"
find.combine = "experts + sigmoid(shared_expert_gate) * shared_expert"
read.scoring = "softmax"
read.top_k = 2
"""


class TestMine(PackTest):
    pack = parse_pack(PACK, "mine.toml")
    replaced: ClassVar[Mapping[str, str]] = {"model.layers.*.mlp": "mine/decoder"}
    mutations: ClassVar[Mapping[str, Any]] = {
        "top-1": lambda model: setattr(model.model.layers[0].mlp.gate, "top_k", 1),
        "another activation": lambda model: setattr(model.model.layers[1].mlp.experts, "act_fn", nn.GELU()),
        "no shared expert gate": lambda model: model.model.layers[0].mlp.shared_expert_gate.weight.zero_(),
    }
    target = "reference"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        return build("qwen2_moe")


class TestWithTheInstalledEngine(TestMine):
    target = "auto"


@pytest.fixture
def mine() -> TestMine:
    return TestMine()


def test_a_rule_of_another_name_fails(mine: TestMine) -> None:
    mine.replaced = {"model.layers.*.mlp": "mine/encoder"}  # type: ignore[misc]
    with pytest.raises(AssertionError, match=r"layers.0.mlp is replaced by the rule mine/decoder, not mine/encoder"):
        mine.test_the_named_blocks_are_replaced_and_no_other()


def test_a_site_that_nothing_was_said_of_fails(mine: TestMine) -> None:
    mine.replaced = {"model.layers.0.mlp": "mine/decoder"}  # type: ignore[misc]
    with pytest.raises(AssertionError, match=r"layers.1.mlp is replaced, and no glob of replaced covers it"):
        mine.test_the_named_blocks_are_replaced_and_no_other()


def test_a_glob_that_covers_nothing_fails(mine: TestMine) -> None:
    mine.replaced = {**mine.replaced, "encoder.*": "mine/decoder"}  # type: ignore[misc]
    with pytest.raises(AssertionError, match=r"no site is replaced at encoder\.\*"):
        mine.test_the_named_blocks_are_replaced_and_no_other()


def test_a_site_that_is_left_has_to_be_left_for_the_reason_said(mine: TestMine) -> None:
    mine.pack = parse_pack(PACK.replace(b"top_k = 2", b"top_k = 3"), "mine.toml")  # type: ignore[misc]
    mine.replaced, mine.left = {}, {"**.mlp": "read.top_k: wanted 3, measured 2"}  # type: ignore[misc]
    mine.test_the_named_blocks_are_replaced_and_no_other()
    mine.left = {"**.mlp": "read.scoring"}  # type: ignore[misc]
    with pytest.raises(AssertionError, match=r"layers.0.mlp is missed: .*, not: read.scoring"):
        mine.test_the_named_blocks_are_replaced_and_no_other()
    with pytest.raises(AssertionError, match="nothing is replaced, so nothing was tested"):
        mine.test_the_outputs_are_the_same_and_undo_restores_the_model()


def test_a_mutation_without_an_effect_fails(mine: TestMine) -> None:
    mine.mutations = {"the same top-k": lambda model: setattr(model.model.layers[0].mlp.gate, "top_k", 2)}  # type: ignore[misc]
    with pytest.raises(AssertionError, match="'the same top-k' changes the outputs by 0.0e"):
        mine.test_no_mutation_is_silently_wrong()


def test_a_wrong_build_fails(mine: TestMine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(ReferenceTarget):
        def build(self, *arguments: Any, **named: Any) -> Any:
            block = super().build(*arguments, **named)
            forward = block.forward
            block.forward = lambda *a, **k: forward(*a, **k) * 2
            return block

    monkeypatch.setattr(verbs, "get_target", lambda name: Doubled())
    with pytest.raises(AssertionError, match=r"layers.0.mlp: the new block"):
        mine.test_the_named_blocks_are_replaced_and_no_other()
    with pytest.raises(AssertionError, match=r"layers.0.mlp: the new block"):
        mine.test_the_outputs_are_the_same_and_undo_restores_the_model()
    # Each mutation ends in an error too, and that is not a silent end.
    mine.test_no_mutation_is_silently_wrong()


def test_a_mutation_that_is_silently_wrong_fails(mine: TestMine) -> None:
    """Stands for a reading that doesn't see a change: outputs that tell the old and the new block apart."""

    def told_apart(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        swapped = any("Swapped" in kind.__name__ for part in model.modules() for kind in type(part).__mro__)
        return outputs(model, inputs) * (1.01 if swapped else 1)

    mine.outputs = told_apart  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="under the mutation 'top-1': outputs moved by 1.0e-02"):
        mine.test_no_mutation_is_silently_wrong()


def test_it_is_as_short_as_promised(tmp_path: Path) -> None:
    """The docstring's example counts ten lines."""
    from moe_surgery.testing import packtest

    example = [line for line in (packtest.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len([line for line in example if line.strip()]) <= 10
