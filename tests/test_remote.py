"""Blocks of remote code, read by dataflow alone: replaced by vLLM's layer, and the same before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo.remote import VARIANTS, H
from zoo.same import distance

import moe_surgery

GENERIC = Path(__file__).parent.parent / "rules" / "generic.toml"
# A block's error is some units of float32's rounding; a wrong one is off by percents, 10^5 units and more.
UNITS = 64


class Layer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.ffn = block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.ffn(x)
        y, *more = y if isinstance(y, tuple) else (y,)
        return x + y, *more


@pytest.mark.parametrize("target", ["reference", "vllm"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_variant_is_read_replaced_and_the_same(variant: type[nn.Module], target: str) -> None:
    torch.manual_seed(0)
    model = Layer(variant()).eval().requires_grad_(False)
    x = torch.randn(2, 9, H)
    before = model(x)
    report = moe_surgery.apply(model, target=target, packs=[GENERIC])
    assert [(step.outcome, step.reason) for step in report.steps] == [("replaced", VARIANTS[variant])]
    for one, other in zip(before, model(x), strict=True):
        assert distance(other, one) < UNITS
    moe_surgery.undo(report)
    assert all(torch.equal(one, other) for one, other in zip(before, model(x), strict=True))
