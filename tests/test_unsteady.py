"""Blocks that answer otherwise when they are asked the same again, in ways that no record shows: left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.around import Alone
from zoo.others import LISTED
from zoo.plain import Base, block_class

import moe_surgery
from moe_surgery.prove.results import UNSTEADY
from moe_surgery.targets.base import SwappedBlock


class Counted(Alone):
    """It counts its calls in a file, and does something else in every other of those that aren't recorded."""

    path: Path

    def odd(self, x: Tensor) -> bool:
        with self.path.open("a") as file:
            file.write(".")
        calls = os.path.getsize(self.path)
        return calls > 200 and calls % 2 == 1


class OutputsDiffer(Counted):
    def forward(self, hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states)
        return out * 2 if self.odd(out) else out


class ResultsDiffer(Counted):
    def forward(self, hidden_states: Tensor) -> Any:
        scores = self.logits(hidden_states).softmax(-1)
        return super().forward(hidden_states), scores * 2 if self.odd(scores) else scores * 1


class AttributesDiffer(Counted):
    def forward(self, hidden_states: Tensor) -> Any:
        scores = self.logits(hidden_states).softmax(-1)
        self.last = scores * 2 if self.odd(scores) else scores * 1
        return super().forward(hidden_states)


@pytest.mark.parametrize("kind", [OutputsDiffer, ResultsDiffer, AttributesDiffer])
def test_what_differs_from_call_to_call_is_left_alone_and_nothing_else(kind: type[Base], tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = plain.make(block_class(kind, *LISTED, name=kind.__name__))
    block.path = tmp_path / "calls"
    steady = plain.make(block_class(Alone, *LISTED, name="Steady"))
    model = nn.ModuleDict({"unsteady": block, "steady": steady}).eval()
    block.path.write_text("")
    moe_surgery.plan(model)
    recorded = os.path.getsize(block.path)
    block.path.write_text("." * (200 - recorded))
    steps = {step.path: step for step in moe_surgery.apply(model, target="reference", model_check=False).steps}
    assert steps["unsteady"].outcome == "refused", steps["unsteady"].reason
    assert UNSTEADY in steps["unsteady"].reason
    assert model["unsteady"] is block
    assert steps["steady"].outcome == "replaced" and isinstance(model["steady"], SwappedBlock)
