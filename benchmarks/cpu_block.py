"""One Qwen3-Omni talker MoE block on CPU: both targets on vLLM's kernels, and transformers' three implementations.

    python benchmarks/cpu_block.py

Random weights at the published size (hidden 1024, 128 experts of width 384, top-6, shared expert of width 768), shared
by all five blocks. In every round each of them is called once on the same tokens, so what else the machine does meets
all alike; a row is the median over the rounds. Before timing, every block's output is compared with the reference in
float32. Writes results/<machine>-cpu_block.json and .svg beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerTextSparseMoeBlock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import chart  # noqa: E402
from command import command  # noqa: E402
from machine import describe, machine_name  # noqa: E402

from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec  # noqa: E402
from moe_surgery.targets import get_target, reference  # noqa: E402
from moe_surgery.weights.tensors import BlockTensors  # noqa: E402

SPEC = MoESpec(
    hidden=1024,
    router=RouterSpec(num_experts=128, top_k=6, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=128, width=384, activation="silu"),
    shared=SharedSpec(width=768, activation="silu", gate="sigmoid"),
)
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
SWAPPED, FOLDED = "vllm", "folded"
BASELINE = "grouped_mm"
FARTHEST = {"float32": 1e-5, "bfloat16": 3e-2}
"""Relative L2 error of the worst token: several times what rounding to the dtype gives, far below any real mistake."""

PATIENCE = 0.5
"""Seconds of a call after which an implementation is not tried on more tokens. batched_mm copies the weights of every
choice of every token: 512 tokens would take 14 GB."""


def build_blocks(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The swapped block and transformers' block with each experts implementation, all over the same weights."""
    assert SPEC.shared is not None
    config = Qwen3OmniMoeTalkerTextConfig(
        hidden_size=SPEC.hidden,
        num_experts=SPEC.experts.num_experts,
        num_experts_per_tok=SPEC.router.top_k,
        moe_intermediate_size=SPEC.experts.width,
        shared_expert_intermediate_size=SPEC.shared.width,
        norm_topk_prob=SPEC.router.renormalize,
    )
    blocks: dict[str, nn.Module] = {}
    weights: dict[str, nn.Parameter] = {}
    for implementation in TRANSFORMERS:
        config = copy.deepcopy(config)
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = Qwen3OmniMoeTalkerTextSparseMoeBlock(config).to(dtype).eval()
        if not weights:
            for name, parameter in block.named_parameters():
                values = torch.randn(parameter.shape).mul_(parameter.shape[-1] ** -0.5)
                weights[name] = nn.Parameter(values.to(dtype), requires_grad=False)
        for name, parameter in weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, parameter)
        blocks[implementation] = block
    for target in (SWAPPED, FOLDED):
        blocks[target] = get_target(target).build(SPEC, tensors_of(weights), prefix=target)
    return blocks


def tensors_of(weights: dict[str, nn.Parameter]) -> BlockTensors:
    return BlockTensors(
        router=weights["gate.weight"].data,
        w13=weights["experts.gate_up_proj"].data,
        w2=weights["experts.down_proj"].data,
        shared_gate_proj=weights["shared_expert.gate_proj.weight"].data,
        shared_up_proj=weights["shared_expert.up_proj.weight"].data,
        shared_down_proj=weights["shared_expert.down_proj.weight"].data,
        shared_gate=weights["shared_expert_gate.weight"].data,
        copied=False,
    )


def check(blocks: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """Stop if a block is not what it should be: a wrong block's speed means nothing."""
    x = torch.randn(1, 32, SPEC.hidden).to(dtype)
    tensors = tensors_of(dict(blocks[BASELINE].named_parameters()))
    logits = x[0].double() @ tensors.router.double().T
    ranked = logits.sort(-1, descending=True).values
    clear = ranked[:, SPEC.router.top_k - 1] - ranked[:, SPEC.router.top_k] > 4 * torch.finfo(dtype).eps * ranked[:, 0]
    wanted = reference.forward(SPEC, tensors, x[0], torch.float32)
    for name, block in blocks.items():
        error = (block(x)[0].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        if not error[clear].max() < FARTHEST[str(dtype).removeprefix("torch.")]:
            raise SystemExit(f"{name} is {float(error[clear].max()):.2g} from the reference in {dtype}")


def measure(
    calls: dict[str, Callable[[Tensor], Tensor]], tokens: int, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Median microseconds of each call, and the number of rounds. The order changes from round to round."""
    inputs = [torch.randn(1, tokens, SPEC.hidden).to(dtype) for _ in range(16)]
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        calls[name](inputs[-1])
    started = time.perf_counter()
    rounds = 0
    while rounds < 5 or time.perf_counter() - started < seconds:
        x = inputs[rounds % len(inputs)]
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            begin = time.perf_counter()
            calls[name](x)
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {"rounds": rounds, "us": {name: statistics.median(times[name]) * 1e6 for name in names}}


def run(
    dtypes: list[str], modes: list[str], tokens: list[int], seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows, and what was left out because fewer tokens already took longer than ``PATIENCE``."""
    rows, left_out = [], []
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        torch.manual_seed(0)
        blocks = build_blocks(dtype)
        check(blocks, dtype)
        for mode in modes:
            calls: dict[str, Any] = dict(blocks)
            if mode == "compiled":
                torch._dynamo.reset()
                calls = {name: torch.compile(block) for name, block in blocks.items()}
            for count in sorted(tokens):
                found = measure(calls, count, dtype, seconds)
                ratio = found["us"][BASELINE] / found["us"][SWAPPED]
                times = "  ".join(f"{name} {us:.0f} µs" for name, us in found["us"].items())
                print(f"{dtype_name} {mode} {count} tokens: {times}  ({ratio:.2f} x {BASELINE})", file=sys.stderr)
                for name, us in found["us"].items():
                    row = {"impl": name, "dtype": dtype_name, "mode": mode, "tokens": count}
                    rows.append({**row, "us": round(us, 1), "rounds": found["rounds"]})
                    if us > PATIENCE * 1e6 and name not in (BASELINE, SWAPPED, FOLDED):
                        del calls[name]
                        later = [more for more in tokens if more > count]
                        left_out += [
                            {**row, "tokens": more, "why": f"over {PATIENCE:g} s at {count}"} for more in later
                        ]
    return rows, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(FARTHEST))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--modes", nargs="+", default=["plain"], choices=["plain", "compiled"])
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each dtype, mode and number of tokens")
    parser.add_argument("--machine", default=machine_name(), help="name of the result files")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    with torch.no_grad():
        rows, left_out = run(arguments.dtypes, arguments.modes, arguments.tokens, arguments.seconds)
    result = {
        **describe(load_before),
        "command": command(),
        "block": SPEC.sentence(),
        "rows": rows,
        "left_out": left_out,
    }
    folder = Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{arguments.machine}-cpu_block.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".svg").write_text(chart.draw(result))
    print(path)


if __name__ == "__main__":
    main()
