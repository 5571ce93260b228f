"""Every family of transformers in bfloat16, and with 256 experts: replaced with proof or not, and why.

    python benchmarks/published.py

Each family's tiny random model is operated on and put back. Writes results/published-families.json, which
``moe-surgery packs test --published`` prints beside what became of them in float32 with few experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from machine import describe  # noqa: E402

import moe_surgery  # noqa: E402
from moe_surgery.testing.families import families, outputs  # noqa: E402
from moe_surgery.testing.published import FORMS, build_form  # noqa: E402


def row_of(name: str, form: str) -> dict[str, Any]:
    """What became of one family in one form."""
    row: dict[str, Any] = {"family": name, "form": form, "outcome": "replaced", "reason": None}
    model, inputs = build_form(families()[name], form)
    before = outputs(model, inputs)
    try:
        report = moe_surgery.apply(model)
    except Exception as error:  # one family's failure must not hide what becomes of the others
        return {**row, "outcome": "refused", "reason": str(error)}
    moe_surgery.undo(report)
    if not torch.equal(outputs(model, inputs), before):
        return {**row, "outcome": "wrong", "reason": "undo did not leave the model as it was"}
    left = next((step for step in report.steps if step.outcome != "replaced"), None)
    return row if left is None else {**row, "outcome": left.outcome, "reason": left.reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load, rows = os.getloadavg(), []
    for name in families():
        for form in FORMS:
            rows.append(row_of(name, form))
            print(rows[-1], flush=True)
    command = " ".join(["python", "benchmarks/published.py", *sys.argv[1:]])
    path = arguments.out / "published-families.json"
    path.write_text(json.dumps({**describe(load), "command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
