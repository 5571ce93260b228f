"""Every family of transformers on a GPU, in bfloat16 and float32: replaced with proof or not, and why.

    python benchmarks/families.py

Each family's tiny random model is operated on, compared with itself before, and put back. Writes
results/<machine>-families.json, which ``moe-surgery packs test --cuda`` prints beside what became of them on a CPU.
A family that the installed transformers can't run has the outcome "not run".
"""

from __future__ import annotations

import argparse
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
from moe_surgery.testing.trial import distance  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FARTHEST = {"bfloat16": 0.5, "float32": 1e-4}
"""How far outputs may move: in float32 by rounding alone. In bfloat16 a near tie that is routed the other way changes
one token of twelve, by at most as much as it is long; that each block is right is what the proof says."""


def row_of(name: str, dtype: str) -> dict[str, Any]:
    """What became of one family."""
    row: dict[str, Any] = {"family": name, "dtype": dtype, "outcome": "replaced", "reason": None, "moved": None}
    try:
        model, inputs = _moved(name, DTYPES[dtype])
        before = outputs(model, inputs)
    except Exception as error:
        return {**row, "outcome": "not run", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        report = moe_surgery.apply(model)
    except SurgeryError as error:
        return {**row, "outcome": "refused", "reason": str(error)}
    left = next((step for step in report.steps if step.outcome != "replaced"), None)
    if left is not None:
        row |= {"outcome": left.outcome, "reason": left.reason}
    row["moved"] = distance(outputs(model, inputs).float(), before.float())
    if row["moved"] > FARTHEST[dtype]:
        row |= {"outcome": "wrong", "reason": f"the model's outputs moved by {row['moved']:.2g}"}
    moe_surgery.undo(report)
    if not torch.equal(outputs(model, inputs), before):
        row |= {"outcome": "wrong", "reason": "undo did not leave the model as it was"}
    return row


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
