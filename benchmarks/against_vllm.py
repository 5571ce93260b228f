"""One block's kernels against those of the installed vLLM, in CUDA graphs, at any number of tokens.

    python benchmarks/against_vllm.py [--cases talker ...] [--tokens 1 8 ...] [--tables]

"vllm" is what vLLM's layer launches for such a block: the router's product, its top-k, its two grouped products with
the tiles that it ships for the card, and the shared expert beside them. "folded" is this library's block, and "crossed"
what a block in an engine does where vLLM's experts are the faster ones: this library's router, then those. All over
the same weights, several layers of them, in graphs that are replayed in turns; the medians, and before that the
greatest distance of each from a reference in float64. The ratio is that of "vllm" to what an engine takes, the better
of the other two. Writes results/<machine>-against_vllm.json after each case, in which all other rows are kept. With
--tables the times go into moe_surgery/kernels/configs/ too, where they are what decides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
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

from moe_surgery.kernels.choice import DEFAULT, FOLDER, shape_name  # noqa: E402
from moe_surgery.spec import MoESpec  # noqa: E402
from moe_surgery.targets import reference  # noqa: E402
from moe_surgery.targets.folded.fold import fold, terms_of  # noqa: E402
from moe_surgery.targets.folded.target import FoldedTarget  # noqa: E402
from moe_surgery.tuning.bench import random_tensors  # noqa: E402
from moe_surgery.weights.tensors import BlockTensors  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
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


class Crossed:
    """Calls what a block in an engine calls on the far side of the crossover."""

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        from moe_surgery.engine.model.crossing_op import with_vllms_experts

        self.call, self.terms, weights = with_vllms_experts, terms_of(spec), fold(tensors)
        if weights.shared_gate is not None and weights.shared_up is not None:  # one matrix, as engines have them
            both = torch.cat([weights.shared_gate, weights.shared_up])
            weights = replace(weights, shared_gate=both, shared_up=None)
        self.weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x, self.weights, self.terms)


def write_table(case: str, found: list[dict[str, Any]]) -> None:
    """The times of a case into its shape's table; numbers of tokens that it has no row for get the tiles that serve."""
    terms = terms_of(CASES[case].spec)
    path = FOLDER / f"{shape_name(terms)}.json"
    name = path if path.is_file() else FOLDER / f"{DEFAULT}-16.json"
    known = {row["tokens"]: row for row in json.loads(name.read_text(encoding="utf-8"))["rows"]}
    for row in found:
        tiles = known[max(tokens for tokens in known if tokens <= row["tokens"])]
        times = {"us": row["folded_us"], "vllm_us": row["crossed_us"]}
        known[row["tokens"]] = {**tiles, "tokens": row["tokens"], **times}
    rows_ = [known[tokens] for tokens in sorted(known)]
    table = {"case": case, "device": torch.cuda.get_device_name(), "dtype": "bfloat16", "rows": rows_}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def distance(spec: MoESpec, tensors: BlockTensors, block: Any, tokens: int = 32) -> float:
    """The median over tokens of the distance from the reference, by its length: single ones may be routed otherwise."""
    x = torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16)
    truth = reference.forward(spec, tensors, x, torch.float64, reference.chosen(spec, tensors, x))
    return float(((block(x).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).median())


def rows(case: str, numbers: list[int]) -> list[dict[str, Any]]:
    spec, layers = CASES[case].spec, CASES[case].layers
    blocks: dict[str, list[Any]] = {"vllm": [], "folded": [], "crossed": []}
    for seed in range(layers):
        tensors = random_tensors(spec, seed=seed)
        blocks["vllm"].append(VllmKernels(spec, tensors))
        blocks["folded"].append(FoldedTarget().build(spec, tensors, prefix=case))
        blocks["crossed"].append(Crossed(spec, tensors))
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
        ratio = round(us["vllm"] / min(us["folded"], us["crossed"]), 3)
        times_ = {f"{impl}_us": time for impl, time in us.items()}
        found.append({"case": case, "tokens": tokens, **times_, "ratio": ratio})
        said = "  ".join(f"{impl} {time:9} us" for impl, time in us.items())
        print(f"{case:18} {tokens:6}  {said}  {ratio:.2f}x", flush=True)
        del graphs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--tables", action="store_true", help="write the times into the kernels' tables too")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    path = arguments.out / f"{machine_name()}-against_vllm.json"
    arguments.out.mkdir(exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found.setdefault(row["case"], []).append(row)
    with torch.no_grad():
        for case in arguments.cases:
            measured = rows(case, arguments.tokens)
            kept = {row["tokens"]: row for row in (*found.get(case, []), *measured)}
            found[case] = [kept[tokens] for tokens in sorted(kept)]
            if arguments.tables:
                write_table(case, measured)
            torch.cuda.empty_cache()
            every = [row for rows_ in found.values() for row in rows_]
            result = {**describe(), "command": command(), "rows": every}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
