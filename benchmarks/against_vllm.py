"""One block's kernels against those of the installed vLLM, in CUDA graphs, at any number of tokens.

    python benchmarks/against_vllm.py [--cases talker ...] [--tokens 1 8 ...]

"vllm" is what vLLM's layer launches for such a block: the router's product, its top-k, its two grouped products with
the tiles that it ships for the card, and the shared expert beside them. "folded" is this library's block. Both over the
same weights, several layers of them, in graphs that are replayed in turns; the medians, and before that the greatest
distance of either from a reference in float64. Writes results/<machine>-against_vllm.json after each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from command import command  # noqa: E402
from cuda_timing import record, timed_replay  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from shapes import CASES  # noqa: E402

from moe_surgery.spec import MoESpec  # noqa: E402
from moe_surgery.targets import reference  # noqa: E402
from moe_surgery.targets.folded.target import FoldedTarget  # noqa: E402
from moe_surgery.tuning.bench import random_tensors  # noqa: E402
from moe_surgery.weights.tensors import BlockTensors  # noqa: E402

TOKENS = (1, 2, 8, 32, 128, 512, 2048, 8192, 16384)
ROUNDS, WARM_UP = 20, 3


class VllmKernels:
    """Calls vLLM's kernels over the tensors of a block."""

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk

        self.spec, self.tensors, self.experts, self.topk = spec, tensors, fused_experts, fused_topk
        pair = (tensors.shared_gate_proj, tensors.shared_up_proj)
        self.gate_up = None if None in pair else torch.cat(pair)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        t, router = self.tensors, self.spec.router
        weights, ids, *_ = self.topk(x, F.linear(x, t.router), router.top_k, router.renormalize)
        out: Tensor = self.experts(x, t.w13, t.w2, weights, ids)
        if self.gate_up is not None:
            assert t.shared_down_proj is not None
            both = F.linear(x, self.gate_up)
            mixed = both.new_empty(len(x), both.shape[1] // 2)
            torch.ops._C.silu_and_mul(mixed, both)
            shared = F.linear(mixed, t.shared_down_proj)
            out += shared if t.shared_gate is None else torch.sigmoid(F.linear(x, t.shared_gate)) * shared
        return out


def distance(spec: MoESpec, tensors: BlockTensors, block: Any, tokens: int = 32) -> float:
    """The median over tokens of the distance from the reference, by its length: single ones may be routed otherwise."""
    x = torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16)
    truth = reference.forward(spec, tensors, x, torch.float64, reference.chosen(spec, tensors, x))
    return float(((block(x).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).median())


def rows(case: str, numbers: list[int]) -> list[dict[str, Any]]:
    spec, layers = CASES[case].spec, CASES[case].layers
    blocks: dict[str, list[Any]] = {"vllm": [], "folded": []}
    for seed in range(layers):
        tensors = random_tensors(spec, seed=seed)
        blocks["vllm"].append(VllmKernels(spec, tensors))
        blocks["folded"].append(FoldedTarget().build(spec, tensors, prefix=case))
    errors = {impl: distance(spec, tensors, each[-1]) for impl, each in blocks.items()}
    assert max(errors.values()) < 0.02, errors
    found = []
    for tokens in numbers:
        inputs = [torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        graphs = {
            impl: record([lambda block=block, x=x: block(x) for block, x in zip(each, inputs, strict=True)])
            for impl, each in blocks.items()
        }
        times: dict[str, list[float]] = {impl: [] for impl in graphs}
        for _ in range(WARM_UP + ROUNDS):
            for impl, graph in graphs.items():
                times[impl].append(timed_replay(graph) / layers)
        us = {impl: round(statistics.median(each[WARM_UP:]), 2) for impl, each in times.items()}
        ratio = round(us["vllm"] / us["folded"], 3)
        found.append({"case": case, "tokens": tokens, "vllm_us": us["vllm"], "folded_us": us["folded"], "ratio": ratio})
        print(f"{case:18} {tokens:6}  vllm {us['vllm']:9} us  folded {us['folded']:9} us  {ratio:.2f}x", flush=True)
        del graphs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    path = arguments.out / f"{machine_name()}-against_vllm.json"
    arguments.out.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in arguments.cases:
            found += rows(case, arguments.tokens)
            torch.cuda.empty_cache()
            result = {**describe(), "command": command(), "rows": found}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
