"""Memory of ``apply`` on stacked expert tensors: what it needs beyond the model, at its peak and afterwards.

    python benchmarks/apply_memory.py [--blocks 4] [--dtype bfloat16]

Builds a model of talker-sized blocks (hidden 1024, 128 experts of width 384, top-6, shared width 768), once per setting
of ``undoable`` in a process of its own, and reads the resident set's high-water mark around ``apply``. Writes
benchmarks/results/<machine>-apply_memory.json; the unit is the bytes of one block's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command import command
from machine import describe, machine_name

RESULTS = Path(__file__).parent / "results"


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(blocks: int, dtype: str, undoable: bool) -> dict[str, Any]:
    """Run ``apply`` once in this process."""
    import gc

    import torch
    from torch import nn
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerTextSparseMoeBlock

    import moe_surgery

    config = Qwen3OmniMoeTalkerTextConfig(
        hidden_size=1024, num_experts=128, num_experts_per_tok=6, moe_intermediate_size=384, norm_topk_prob=True
    )
    config.shared_expert_intermediate_size = 768
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)

    def block() -> nn.Module:
        made = Qwen3OmniMoeTalkerTextSparseMoeBlock(config).to(getattr(torch, dtype))
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.03)
        return made

    # One operation on a small model first: what libraries keep for themselves is not the operation's memory.
    config.num_experts = 8
    moe_surgery.apply(nn.ModuleDict({"mlp": block()}).eval(), packs=["generic"])
    config.num_experts = 128
    model = nn.ModuleList(nn.ModuleDict({"mlp": block()}) for _ in range(blocks)).eval()
    size = sum(p.nbytes for p in model.parameters()) // blocks
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    started = time.perf_counter()
    report = moe_surgery.apply(model, packs=["generic"], undoable=undoable)
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    gc.collect()
    after = resident("VmRSS")
    assert len(report.replaced) == blocks
    return {
        "undoable": undoable,
        "blocks": blocks,
        "block_bytes": size,
        "model_blocks": round(before / size, 2),
        "peak_extra_blocks": round((peak - before) / size, 2),
        "final_extra_blocks": round((after - before) / size, 2),
        "reported_kept_blocks": round(report.memory.kept / size, 2),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--child", choices=("True", "False"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.blocks, arguments.dtype, arguments.child == "True")))
        return
    rows, load_before = [], os.getloadavg()
    for undoable in (True, False):
        options = ["--blocks", str(arguments.blocks), "--dtype", arguments.dtype, "--child", str(undoable)]
        done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"undoable={undoable!s:5}  peak +{rows[-1]['peak_extra_blocks']:.2f} blocks, "
            f"afterwards +{rows[-1]['final_extra_blocks']:.2f} blocks ({rows[-1]['seconds']} s)"
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine_name()}-apply_memory.json"
    path.write_text(
        json.dumps({**describe(load_before), "command": command(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    print(path)


if __name__ == "__main__":
    main()
