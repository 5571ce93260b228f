"""Hugging Face ``generate`` on a model of talker-sized blocks, before and after surgery, eager and compiled.

    python benchmarks/generate.py [--layers 20] [--new-tokens 64]

Batch 1, greedy, bfloat16, random weights. "eager" is ``generate`` as it comes, with transformers' grouped_mm experts;
"compiled" is ``generate`` with a static cache, which transformers compiles with mode="reduce-overhead". A row is the
median milliseconds of one decoding step: the time of --new-tokens tokens less that of one, over their number less one.
Writes results/<machine>-generate.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from gpu_machine import describe, machine_name  # noqa: E402
from talker_model import build  # noqa: E402

import moe_surgery  # noqa: E402


def seconds(model: Any, count: int, options: dict[str, Any]) -> float:
    ids = torch.arange(1, 17, device="cuda")[None]
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
    torch.cuda.synchronize()
    assert out.shape[1] == ids.shape[1] + count
    return time.perf_counter() - started


def step_ms(model: Any, count: int, rounds: int, options: dict[str, Any]) -> float:
    for _ in range(2):
        seconds(model, count, options)
    times = [seconds(model, count, options) - seconds(model, 1, options) for _ in range(rounds)]
    return statistics.median(times) / (count - 1) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # for what transformers computes in float32, alike for both
    rows: list[dict[str, Any]] = []
    model = build(arguments.layers)
    for impl in ("grouped_mm", "folded"):
        if impl == "folded":
            report = moe_surgery.apply(model, packs=["generic"], undoable=False)
            assert len(report.replaced) == arguments.layers
        for mode in arguments.modes:
            torch._dynamo.reset()
            options = {"cache_implementation": "static"} if mode == "compiled" else {}
            ms = step_ms(model, arguments.new_tokens, arguments.rounds, options)
            rows.append({"impl": impl, "mode": mode, "tokens": 1, "us": round(ms * 1e3, 1)})
            print(rows[-1], flush=True)
    command = " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]])
    result = {**describe(), "command": command, "layers": arguments.layers, "rows": rows}
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{machine_name()}-generate.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
