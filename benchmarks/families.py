"""Every family of transformers on a GPU, in bfloat16 and float32: replaced with proof or not, and why.

    python benchmarks/families.py

Each family's tiny random model is operated on, compared with itself before, and put back. In bfloat16 a near tie may be
routed the other way, so there the typical token is compared, and with the dtype's noise. Writes
results/<machine>-families.json, which ``moe-surgery packs test --cuda`` prints beside what became of them on a CPU.
A family that the installed transformers can't run has the outcome "not run".
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from gpu_machine import describe, machine_name  # noqa: E402

import moe_surgery  # noqa: E402
from moe_surgery.errors import SurgeryError  # noqa: E402
from moe_surgery.testing.families import build, families, outputs  # noqa: E402
from moe_surgery.testing.trial import TOLERANCE, distance, typical_distance  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDED = 2.0
"""How many times the dtype's noise a typical token may move: before and after are each once as far from the truth."""


def row_of(name: str, dtype: str) -> dict[str, Any]:
    """What became of one family."""
    row: dict[str, Any] = {"family": name, "dtype": dtype, "outcome": "replaced", "reason": None, "moved": None}
    try:
        model, inputs = _moved(name, DTYPES[dtype])
        before = outputs(model, inputs)
        bound = ROUNDED * noise(model, inputs, before) if dtype != "float32" else TOLERANCE
    except Exception as error:
        return {**row, "outcome": "not run", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        report = moe_surgery.apply(model)
    except SurgeryError as error:
        return {**row, "outcome": "refused", "reason": str(error)}
    left = next((step for step in report.steps if step.outcome != "replaced"), None)
    if left is not None:
        row |= {"outcome": left.outcome, "reason": left.reason}
    measure = distance if dtype == "float32" else typical_distance
    row["moved"], row["bound"] = measure(outputs(model, inputs).float(), before.float()), bound
    if not row["moved"] <= bound:
        row |= {"outcome": "wrong", "reason": f"the model's outputs moved by {row['moved']:.2g}, beyond {bound:.2g}"}
    moe_surgery.undo(report)
    if not torch.equal(outputs(model, inputs), before):
        row |= {"outcome": "wrong", "reason": "undo did not leave the model as it was"}
    return row


def noise(model: nn.Module, inputs: dict[str, Any], outputs_: Tensor) -> float:
    """How far a typical token is from what the same weights give in float32."""
    wide = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return typical_distance(outputs_, outputs(copy.deepcopy(model).float(), wide).float())


def _moved(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(name)

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("cuda", dtype if value.is_floating_point() else value.dtype)

    return model.to("cuda", dtype), {key: there(value) for key, value in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    rows = []
    for name in families():
        for dtype in arguments.dtypes:
            rows.append(row_of(name, dtype))
            print(rows[-1], flush=True)
    command = " ".join(["python", "benchmarks/families.py", *sys.argv[1:]])
    path = arguments.out / f"{machine_name()}-families.json"
    path.write_text(json.dumps({**describe(), "command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
