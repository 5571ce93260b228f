"""Hugging Face ``generate`` on a model of talker-sized blocks, before and after surgery, eager and compiled.

    python benchmarks/generate.py [--layers 20] [--new-tokens 64]

Batch 1, greedy, bfloat16, random weights. "eager" is ``generate`` as it comes, with transformers' grouped_mm experts;
"compiled" is ``generate`` with a static cache, which transformers compiles with mode="reduce-overhead". A row is the
median microseconds of one decoding step: the time of --new-tokens tokens less that of one, over their number less one.
Every row has a process of its own, since what one compiles stays with it; all are timed on the same core of the host.
Writes results/<machine>-generate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from talker_model import build  # noqa: E402


def seconds(model: Any, count: int, options: dict[str, Any]) -> float:
    ids = torch.arange(1, 17, device="cuda")[None]
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
    torch.cuda.synchronize()
    assert out.shape[1] == ids.shape[1] + count
    return time.perf_counter() - started


def steps_us(impl: str, mode: str, layers: int, count: int, rounds: int) -> list[float]:
    """Build the model, operate on it if ``impl`` says so, and time it, a few times."""
    import moe_surgery

    torch.set_float32_matmul_precision("high")  # for what transformers computes in float32, alike for both
    model = build(layers, "grouped_mm")
    if impl == "folded":
        report = moe_surgery.apply(model, packs=["generic"], undoable=False)
        assert len(report.replaced) == layers
    options = {"cache_implementation": "static"} if mode == "compiled" else {}
    for _ in range(2):
        seconds(model, count, options)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # cores of virtual machines differ by half
    times = [seconds(model, count, options) - seconds(model, 1, options) for _ in range(rounds)]
    return [each / (count - 1) * 1e6 for each in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.layers, arguments.new_tokens, arguments.rounds)
    if arguments.child:
        print(json.dumps(steps_us(*arguments.child, *sizes)))
        return
    path = arguments.out / f"{machine_name()}-generate.json"
    arguments.out.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for mode in arguments.modes:
        for impl in ("grouped_mm", "folded"):
            names = ("--layers", "--new-tokens", "--rounds")
            options = [text for pair in zip(names, map(str, sizes), strict=True) for text in pair]
            child = [sys.executable, __file__, *options, "--child", impl, mode]
            done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
            times = json.loads(done.stdout.splitlines()[-1])
            spread = [round(bound, 1) for bound in (min(times), max(times))]
            us = round(statistics.median(times), 1)
            rows.append({"impl": impl, "mode": mode, "tokens": 1, "us": us, "us_spread": spread})
            print(rows[-1], flush=True)
            result = {**describe(), "command": command(), "layers": arguments.layers, "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
