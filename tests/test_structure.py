"""Blocks that share a structure are read once; one that might compute something else never shares it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import nearmiss
from zoo.same import Holder

import moe_surgery
from moe_surgery.planning import survey
from moe_surgery.read import sameness as module
from moe_surgery.read.sameness import structure


class Block(nn.Module):
    """What a block may carry along: numbers that its code looks at, and one that it doesn't."""

    def __init__(self, layer: int = 0, place: str = "layers.0.mlp") -> None:
        super().__init__()
        self.layer_idx, self.name, self.shown = layer, f"{place}.gate", "shown"
        self.top_k, self.scale, self.act, self.norm = 2, 1.5, nn.SiLU(), nn.LayerNorm(8)
        self.gate = nn.Linear(8, 4)
        self.table = {"a": [1, 2.0]}

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.gate(self.norm(x))).topk(self.top_k).values * self.scale
        return y * self.helped() if self.shown else y + self.table["a"][0]

    def helped(self) -> float:
        return helper(self)


def helper(block: nn.Module) -> float:
    return 2.0 if block.looked_at_by_helper else 1.0


def patched(number: float) -> Callable[[Block], Callable[[Tensor], Tensor]]:
    def make(block: Block) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return block.gate(x) * number

        return forward

    return make


def key(block: nn.Module, place: str = "layers.0.mlp") -> object:
    return structure(block, place)


def test_blocks_that_differ_in_weights_and_place_share_it() -> None:
    assert key(Block()) == key(Block(7, "layers.7.mlp"), "layers.7.mlp")
    one, other = Block(), Block(3)
    one.forward, other.forward = patched(2.0)(one), patched(2.0)(other)
    assert key(one) == key(other)


def change(name: str, value: object) -> Callable[[Block], None]:
    return lambda block: setattr(block, name, value)


CHANGES: dict[str, Callable[[Block], None]] = {
    "a number": change("top_k", 3),
    "a factor": change("scale", 1.25),
    "a number of another kind": change("top_k", 2.0),
    "a text that the code looks at": change("shown", ""),
    "what a helper looks at": change("looked_at_by_helper", True),
    "what a table holds": lambda block: block.table["a"].append(3),
    "a child's class": change("act", nn.GELU()),
    "a child's own number": lambda block: setattr(block.norm, "eps", 1e-6),
    "a child's forward": lambda block: setattr(block.gate, "forward", lambda x: x),
    "one child more": change("after", nn.LayerNorm(4)),
    "one buffer more": lambda block: block.register_buffer("scales", torch.ones(4)),
    "another shape": change("gate", nn.Linear(8, 6)),
    "another dtype": lambda block: block.gate.to(torch.bfloat16),
    "no bias": change("gate", nn.Linear(8, 4, bias=False)),
    "evaluation mode": lambda block: block.eval(),
    "a hook": lambda block: block.register_forward_hook(lambda *_: None),
    "a patched forward": lambda block: setattr(block, "forward", patched(2.0)(block)),
    "an object": change("table", object()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_a_forward_may_see_counts(name: str) -> None:
    block = Block()
    CHANGES[name](block)
    assert key(block) != key(Block())


def test_a_patched_forward_counts_by_its_code_and_what_it_closes_over() -> None:
    blocks = [Block() for _ in range(4)]
    blocks[0].forward, blocks[1].forward = patched(2.0)(blocks[0]), patched(3.0)(blocks[1])
    blocks[2].forward = patched(2.0)(blocks[3])  # of another block
    blocks[3].forward = lambda x: blocks[3].gate(x) * 2.0
    assert len({key(block) for block in blocks}) == 4


def test_code_that_may_look_at_anything_sees_a_layers_number() -> None:
    class Blind(Block):
        def helped(self) -> float:
            return vars(self)["layer" + "_idx"]

    assert key(Blind(0)) != key(Blind(1))


def test_no_near_miss_shares_the_plain_blocks_structure() -> None:
    plain = key(nearmiss.CASES[0].make())
    shared = [case.name for case in nearmiss.CASES[1:] if key(case.make()) == plain]
    assert shared == []


def test_a_model_of_many_layers_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in nearmiss.CASES if not case.words)
    read, calls = survey.read, 0

    def counted(*given: Any) -> object:
        nonlocal calls
        calls += 1
        return read(*given)

    monkeypatch.setattr(survey, "read", counted)
    model = nn.ModuleList(Holder(case.make()) for _ in range(12)).eval()
    report = moe_surgery.plan(model, target="reference", packs=["generic"])
    assert len(report.steps) == 12 and all(step.outcome == "replaced" for step in report.steps)
    assert calls == 1


def test_a_class_is_looked_through_once() -> None:
    module._named_by.cache_clear()
    key(Block())
    before = module._named_by.cache_info().misses
    key(Block(1))
    assert module._named_by.cache_info().misses == before
