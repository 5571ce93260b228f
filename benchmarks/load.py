"""What surgery itself takes on a GPU: time and memory of ``apply`` on a model of talker-sized blocks.

    python benchmarks/load.py [--layers 8 | --full]

``--full`` takes Qwen3-Omni-30B-A3B at its published size instead, with random weights: 68 blocks in a model of 66 GiB.

Memory is that of torch's allocator, beyond the model: at its peak during ``apply``, the proof included, and afterwards.
The proofs of all blocks are read off, too: the least margin, and the greatest error beside the dtype's own noise.
Writes results/<machine>-load.json, or -load-full.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from talker_model import build  # noqa: E402

import moe_surgery  # noqa: E402


def full() -> Any:
    """Qwen3-Omni-30B-A3B in bfloat16, every matrix of standard deviation ``fan_in ** -0.5``."""
    from qwen3_omni_config import FULL, omni_config
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**omni_config(FULL)))
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else fan_in**-0.5)
    return model.eval()


def measure(model: Any, undoable: bool) -> dict[str, Any]:
    gc.collect()  # a model of before that is freed meanwhile would make this one's memory look less
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    report = moe_surgery.apply(model, packs=["generic"], undoable=undoable)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    verdicts = [step.verdict for step in report.replaced if step.verdict is not None]
    assert len(verdicts) == len(report.steps)
    return {
        "undoable": undoable,
        "blocks": len(verdicts),
        "seconds": round(seconds, 2),
        "parts": {name: round(part, 2) for name, part in report.phases},
        "seconds_per_block": round(seconds / len(verdicts), 3),
        "bytes_by_reference": report.memory.moved,
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
    parser.add_argument("--full", action="store_true", help="the published model, which needs 72 GiB of GPU memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    measure(build(1), True)  # compiles the kernels, which Triton keeps
    rows = []
    for undoable in (False,) if arguments.full else (True, False):
        rows.append(measure(full() if arguments.full else build(arguments.layers), undoable))
        print(rows[-1], flush=True)
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{machine_name()}-load{'-full' if arguments.full else ''}.json"
    path.write_text(json.dumps({**describe(), "command": command(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
