"""Every family of transformers on a GPU: what could be read is computed by this library's kernels, proven."""

from __future__ import annotations

import pytest
import torch

import moe_surgery
from moe_surgery.testing.families import build, families, outputs
from moe_surgery.testing.trial import TOLERANCE, distance

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# In bfloat16 some of the twelve tokens are near ties; one that is routed the other way moves the outputs by this much.
MOVED = {"bfloat16": 0.2, "float32": TOLERANCE}


def built(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, object]]:
    """The tiny model of a family, and its inputs, on the GPU; skips those that the installed transformers can't run."""

    def moved(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("cuda", dtype if value.is_floating_point() else value.dtype)

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
    report = moe_surgery.apply(model)
    ends = {(step.outcome, step.target if step.outcome == "replaced" else None) for step in report.steps}
    assert ends <= {("replaced", "folded"), ("missed", None)}, [step.reason for step in report.steps]
    assert distance(outputs(model, inputs).float(), before.float()) < MOVED[dtype]
    print(f"{name} {dtype}: {sorted(end[0] for end in ends)}")
