"""One MoE block on a GPU: folded, against transformers' implementations and vLLM's layers.

    python benchmarks/block.py [--case talker ...] [--tokens 1 8 ...] [--impls ...]

Random weights at a published size, bfloat16. Every implementation has as many layers as the others, each with weights
of its own (transformers' and ours share them), and is timed in a CUDA graph of all layers ("graph") and called layer
after layer without one ("eager"); the time of one block is that of the stack over the number of layers.
Implementations take turns, and a row is the median. Before timing, each is compared with a float32 reference. "floor"
is the time that reading each weight that is hit once takes, at the rate of a large copy or sum.

Writes results/<machine>-block.json and .svg for the talker, results/<machine>-block-<case>.json for each other case.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import chart  # noqa: E402
from command import command  # noqa: E402
from cuda_timing import memory_rate, record, timed_eager, timed_replay  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from shapes import CASES  # noqa: E402

from moe_surgery.spec import MoESpec  # noqa: E402
from moe_surgery.targets import reference  # noqa: E402
from moe_surgery.targets.folded.target import FoldedTarget  # noqa: E402
from moe_surgery.tuning.bench import random_tensors  # noqa: E402
from moe_surgery.weights.tensors import BlockTensors  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
VLLM = ("hand-written", "vllm")
OURS = "folded"
FARTHEST = 3e-2
"""Relative L2 error of the worst token in bfloat16: several times what rounding gives, far below any real mistake."""

SLOW = 5_000.0
"""Microseconds of a call after which an implementation is not tried on more tokens."""

MANY = 1024
"""From this many tokens on, three layers are enough: activations alone are larger than the L2 cache."""


def transformers_block(spec: MoESpec, tensors: BlockTensors, implementation: str) -> nn.Module:
    """transformers' own block over ``tensors``, by reference."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerTextSparseMoeBlock

    assert spec.shared is not None
    config = Qwen3OmniMoeTalkerTextConfig(
        hidden_size=spec.hidden,
        num_experts=spec.experts.num_experts,
        num_experts_per_tok=spec.router.top_k,
        moe_intermediate_size=spec.experts.width,
        shared_expert_intermediate_size=spec.shared.width,
        norm_topk_prob=spec.router.renormalize,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3OmniMoeTalkerTextSparseMoeBlock(config).to(tensors.w13.dtype).eval()
    weights = {
        "gate.weight": tensors.router,
        "experts.gate_up_proj": tensors.w13,
        "experts.down_proj": tensors.w2,
        "shared_expert.gate_proj.weight": tensors.shared_gate_proj,
        "shared_expert.up_proj.weight": tensors.shared_up_proj,
        "shared_expert.down_proj.weight": tensors.shared_down_proj,
        "shared_expert_gate.weight": tensors.shared_gate,
    }
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return block


def build(spec: MoESpec, stack: list[BlockTensors], impl: str, case: str) -> list[Callable[[Tensor], Tensor]]:
    """One block for each layer of the stack; all take and return [T, H]."""
    if impl == OURS:
        target = FoldedTarget()
        return [target.build(spec, tensors, prefix=f"layers.{i}") for i, tensors in enumerate(stack)]
    if impl in TRANSFORMERS:
        blocks = [transformers_block(spec, tensors, impl) for tensors in stack]
        return [lambda x, block=block: block(x[None])[0] for block in blocks]
    from vllm_layers import VllmBlock

    fused = impl == "vllm"
    return [VllmBlock(spec, tensors, f"{case}.{impl}.{i}", fused=fused) for i, tensors in enumerate(stack)]


def errors(spec: MoESpec, tensors: BlockTensors, blocks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each block's relative L2 error against float32 with the same routing, over tokens whose routing is clear."""
    x = torch.randn(256, spec.hidden, device="cuda").to(tensors.w13.dtype)
    logits, _ = reference.router_scores(spec, tensors.router, x, None)
    ranked = logits.float().sort(-1, descending=True).values
    gap = ranked[:, spec.router.top_k - 1] - ranked[:, spec.router.top_k]
    x = x[gap > 4 * torch.finfo(x.dtype).eps * ranked[:, 0]]
    wanted = reference.forward(spec, tensors, x, torch.float32)
    found = {}
    for name, layers in blocks.items():
        out = layers[0](x).float()
        error = (out - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        found[name] = {"mean": float(error.mean()), "worst": float(error.max()), "tokens": len(x)}
        if not found[name]["worst"] < FARTHEST:
            raise SystemExit(f"{name} is {found[name]['worst']:.2g} from the reference")
    return found


def floor_us(spec: MoESpec, stack: list[BlockTensors], inputs: list[Tensor], rate: float) -> float:
    """The mean time to read what the tokens of a call hit, once."""
    size = 3 * spec.hidden * spec.experts.width
    shared = 3 * spec.hidden * spec.shared.width if spec.shared is not None else 0
    total = 0
    for tensors, x in zip(stack, inputs, strict=False):
        logits, _ = reference.router_scores(spec, tensors.router, x, None)
        total += len(logits.topk(spec.router.top_k, -1).indices.unique()) * size + shared + tensors.router.numel()
    return total * stack[0].w13.element_size() / len(inputs) / rate * 1e6


def measure(calls: dict[str, list[Callable[[], object]]], mode: str, budget: float) -> tuple[dict[str, float], Any]:
    """Median microseconds of one block of each implementation, which take turns; and what couldn't be timed."""
    runs: dict[str, Callable[[], float]] = {}
    failed = {}
    for name, stack in calls.items():
        try:
            if mode == "graph":
                graph = record(stack)
                runs[name] = lambda graph=graph, stack=stack: timed_replay(graph) / len(stack)
            else:
                runs[name] = lambda stack=stack: timed_eager(stack) / len(stack)
            runs[name]()
        except Exception as error:
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            torch.cuda.synchronize()
    names = list(runs)
    for _ in range(2):
        first = {name: runs[name]() for name in names}
    longest = sum(first.values()) * max(len(stack) for stack in calls.values())
    rounds = int(min(60, max(7, budget * 1e6 / longest)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in times.items()}, failed


def run(case: str, impls: list[str], tokens: list[int], modes: list[str], budget: float) -> dict[str, Any]:
    spec, layers = CASES[case].spec, CASES[case].layers
    rate = memory_rate()
    stack = [random_tensors(spec, seed=seed) for seed in range(layers)]
    blocks = {impl: build(spec, stack, impl, case) for impl in impls}
    found_errors = errors(spec, stack[0], blocks)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for mode in modes:
        slow: set[str] = set()
        for count in tokens:
            few = layers if count < MANY else 3
            inputs = [torch.randn(count, spec.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(few)]
            calls = {
                impl: [lambda x=x, block=block: block(x) for x, block in zip(inputs, made, strict=False)]
                for impl, made in blocks.items()
                if impl not in slow
            }
            us, failed = measure(calls, mode, budget)
            if mode == "graph":
                us["floor"] = floor_us(spec, stack, inputs, rate)
            for impl, value in us.items():
                rows.append({"impl": impl, "mode": mode, "tokens": count, "us": round(value, 2)})
                if value > SLOW:
                    slow.add(impl)
                    left_out.append({"impl": impl, "mode": mode, "tokens": f"> {count}", "why": "too slow"})
            for impl, why in failed.items():
                slow.add(impl)
                left_out.append({"impl": impl, "mode": mode, "tokens": f">= {count}", "why": why})
            print(mode, count, {impl: round(value, 1) for impl, value in us.items()}, failed or "", flush=True)
            del calls
    return {
        "block": spec.sentence(),
        "layers": layers,
        "memory_rate_tb_s": round(rate / 1e12, 3),
        "errors": found_errors,
        "rows": rows,
        "left_out": left_out,
    }


def main() -> None:
    have_vllm = find_spec("vllm") is not None
    known = [*TRANSFORMERS, *(VLLM if have_vllm else ()), OURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["talker"], choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--modes", nargs="+", default=["graph", "eager"], choices=["graph", "eager"])
    parser.add_argument("--impls", nargs="+", choices=known)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each mode and number of tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    wanted = {
        case: arguments.impls or [impl for impl in known if case == "talker" or impl not in TRANSFORMERS]
        for case in arguments.case
    }
    with ExitStack() as context:
        context.enter_context(torch.inference_mode())
        if any(set(VLLM).intersection(impls) for impls in wanted.values()):
            from vllm_layers import without_engine

            context.enter_context(without_engine())
        for case, impls in wanted.items():
            result = run(case, impls, arguments.tokens, arguments.modes, arguments.seconds)
            write(case, {**describe(), "command": command(), **result}, arguments.out)
            torch.cuda.empty_cache()


def write(case: str, result: dict[str, Any], out: Path) -> None:
    """Store a case's result in ``out``, and its chart beside it."""
    suffix = "" if case == "talker" else f"-{case}"
    out.mkdir(exist_ok=True)
    path = out / f"{machine_name()}-block{suffix}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".svg").write_text(chart.draw(as_chart(result)), encoding="utf-8")
    print(path)


def as_chart(result: dict[str, Any]) -> dict[str, Any]:
    """The result in the form that the chart draws: one panel for each mode."""
    drawn = copy.copy(result)
    drawn["rows"] = [{"dtype": "bfloat16", **row} for row in result["rows"]]
    return drawn


if __name__ == "__main__":
    main()
