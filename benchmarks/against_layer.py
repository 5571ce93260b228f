"""Folded blocks of a quantised model in an engine, by this library's kernels and by vLLM's own layer, for more tokens.

    python benchmarks/against_layer.py CHECKPOINT [--target auto] [--tokens 1 2 ...] [--out results]

CHECKPOINT is one that benchmarks/served.py wrote (``--write --folder``). The engine runs with surgery, proven; all of
its blocks are then called one after another in one CUDA graph, once as the kernels compute them and once as vLLM's
layer does, which holds the same weights with the shared expert inside: what ``--target vllm`` gives.
Microseconds of a block are added to results/<machine>-against_layer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402

TOKENS = (1, 2, 4, 8, 9, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def call_of(block: Any, x: Tensor, vllm: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with block.always(vllm=vllm):
            out: Tensor = block(x)
        return out

    return call


def measured(model: nn.Module, config: Any, numbers: list[int]) -> list[dict[str, float]]:
    """For each number of tokens the microseconds of a block, by the kernels and by vLLM's layer."""
    from vllm.forward_context import set_forward_context

    from moe_surgery.engine.model.kernel_block import KernelBlock
    from moe_surgery.timing.graphs import graph_us

    blocks = [module for module in model.modules() if isinstance(module, KernelBlock)]
    rows = []
    for tokens in numbers:
        row: dict[str, float] = {"tokens": tokens}
        inputs = [torch.randn(tokens, b.terms.hidden, device="cuda", dtype=torch.bfloat16) for b in blocks]
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=tokens):
            for name, vllm in (("us", False), ("vllm_us", True)):
                calls = [call_of(block, x, vllm) for block, x in zip(blocks, inputs, strict=True)]
                row[name] = round(graph_us(calls), 2)
        row["ratio"] = round(row["vllm_us"] / row["us"], 3)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--target", default="auto", choices=("auto", "folded"))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    from engine_examples import plugin_path

    with tempfile.TemporaryDirectory() as name:
        sys.path[:0] = plugin_path(Path(name)).split(os.pathsep)
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
        import vllm

        import moe_surgery

        handle = moe_surgery.install(target=arguments.target, run=str(Path(name) / "run"), prove="all")
        llm = vllm.LLM(
            str(arguments.checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_batched_tokens=max(4096, *arguments.tokens),
            max_num_seqs=4,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
            gpu_memory_utilization=0.05,
            disable_log_stats=True,
        )
        handle.check()
        [rows] = llm.apply_model(lambda model: measured(model, llm.llm_engine.vllm_config, arguments.tokens))
    path = arguments.out / f"{machine_name()}-against_layer.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}
    models = {**result["models"], arguments.checkpoint.name: rows}
    result = {**describe(), "command": command(), "models": models}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
