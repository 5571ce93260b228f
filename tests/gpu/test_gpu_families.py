"""Every family of transformers on a GPU: what could be read is computed by this library's kernels, proven."""

from __future__ import annotations

import copy
from typing import TypeGuard

import pytest
import torch

import moe_surgery
from moe_surgery.testing.families import build, families, outputs
from moe_surgery.testing.trial import TOLERANCE, distance, typical_distance

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDED = 2.0
"""Outputs before and after are each once the dtype's noise from the truth."""


def is_floating(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def built(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, object]]:
    """The tiny model of a family, and its inputs, on the GPU; skips those that the installed transformers can't run."""

    def moved(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("cuda", dtype if is_floating(value) else value.dtype)

    try:
        model, inputs = build(name)
        model = model.to("cuda", dtype)
        inputs = {key: moved(value) for key, value in inputs.items()}
        outputs(model, inputs)
    except Exception as error:
        pytest.skip(f"this transformers doesn't run it: {str(error)[:100]}")
    return model, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", families())
def test_what_is_read_is_replaced(name: str, dtype: str) -> None:
    model, inputs = built(name, DTYPES[dtype])
    before = outputs(model, inputs)
    wide = {name: value.float() if is_floating(value) else value for name, value in inputs.items()}
    truth = before if dtype == "float32" else outputs(copy.deepcopy(model).float(), wide)
    report = moe_surgery.apply(model)
    ends = {(step.outcome, step.target if step.outcome == "replaced" else None) for step in report.steps}
    assert ends <= {("replaced", "folded"), ("missed", None)}, [step.reason for step in report.steps]
    after = outputs(model, inputs)
    if dtype == "float32":
        assert distance(after, before) < TOLERANCE
    else:  # a near tie may be routed the other way, which moves one token of twelve: the typical one is compared
        assert typical_distance(after, before) < ROUNDED * typical_distance(before, truth)
    print(f"{name} {dtype}: {sorted(end[0] for end in ends)}")
