"""What surgery itself takes on a GPU: time and memory of ``apply`` on a model of talker-sized blocks.

    python benchmarks/load.py [--layers 8]

Memory is that of torch's allocator, beyond the model: at its peak during ``apply``, the proof included, and afterwards.
The proofs of all blocks are read off, too: the least margin, and the greatest error beside the dtype's own noise.
Writes results/<machine>-load.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from talker_model import build  # noqa: E402

import moe_surgery  # noqa: E402


def measure(layers: int, undoable: bool) -> dict[str, Any]:
    model = build(layers)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block = sum(parameter.nbytes for parameter in model.model.layers[0].mlp.parameters())
    started = time.perf_counter()
    report = moe_surgery.apply(model, packs=["generic"], undoable=undoable)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    verdicts = [step.verdict for step in report.replaced if step.verdict is not None]
    assert len(verdicts) == layers
    return {
        "undoable": undoable,
        "layers": layers,
        "seconds": round(seconds, 2),
        "seconds_per_block": round(seconds / layers, 2),
        "block_bytes": block,
        "peak_extra_bytes": torch.cuda.max_memory_allocated() - before,
        "final_extra_bytes": torch.cuda.memory_allocated() - before,
        "least_margin": round(min(verdict.margin for verdict in verdicts), 2),
        "greatest_error": max(verdict.build_error or 0.0 for verdict in verdicts),
        "greatest_error_of_the_original": max(verdict.reading_error for verdict in verdicts),
        "noise_of_bfloat16": max(verdict.noise for verdict in verdicts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    measure(1, True)  # compiles the kernels, which Triton keeps
    rows = []
    for undoable in (True, False):
        rows.append(measure(arguments.layers, undoable))
        print(rows[-1], flush=True)
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{machine_name()}-load.json"
    path.write_text(json.dumps({**describe(), "command": command(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
