"""What a plan says that it costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moe_surgery.planning.costs import Costs


def model(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(50, 100, bias=False), nn.Linear(10, 10))


def test_bytes_are_counted_in_the_dtype_of_the_model() -> None:
    found = Costs.of(model("meta").bfloat16(), ["0", "1"])
    assert (found.model, found.blocks, found.largest) == (2 * (10000 + 5000 + 110), 2 * 15000, 2 * 10000)
    assert found.extra_without_undo < found.extra == 2 * 15000 + round(0.31 * 20000)
    assert found.free is None or found.free > 0


def test_a_loaded_model_is_not_counted_twice() -> None:
    wanted = replace(Costs.of(model(), ["0"]), free=None)
    assert wanted == replace(Costs.of(model("meta"), ["0"]), free=None)


def test_it_says_whether_it_fits() -> None:
    costs = Costs(80, model=100 * 2**30, blocks=80 * 2**30, largest=2**30, free=200 * 2**30)
    assert costs.sentence().endswith("fits into the memory that is free here")
    assert "only --no-undo fits" in replace(costs, free=110 * 2**30).sentence()
    assert "DOES NOT FIT" in replace(costs, free=100 * 2**30).sentence()
    assert costs.to_json()["fits"] is True and replace(costs, free=None).to_json()["fits"] is None


def test_nothing_to_replace_costs_nothing() -> None:
    found = Costs.of(model("meta"), [])
    assert (found.blocks, found.extra, found.extra_without_undo) == (0, 0, 0)
