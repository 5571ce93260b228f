"""A whole vLLM engine on a GPU: decoding steps and prefill of a talker-sized model, its MoE blocks built three ways.

    python benchmarks/step.py [--layers 20]

"hand-written" computes the shared expert beside ``FusedMoE``, "vllm" is vLLM's own shared-fused layer, and "folded" our
kernels as a module of the same model class. The three are models of one class in one vLLM release (0.24 to 0.26, where
``FusedMoE`` is a function), built here and not by surgery. Each has a process, an engine and a compile cache of its
own; they are measured in turns. "device" is the time between CUDA events around the model's forward, "wall" that of
one engine step. Dummy weights. Writes results/<machine>-step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

IMPLS = ("hand-written", "vllm", "folded")
DECODE = (1, 8, 32, 128)
PREFILL = (512, 2048)
STEPS = 40


def child(impl: str, folder: str) -> None:
    """Serve measurements: one line of JSON on stdin asks for one, the answer goes to stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import qwen2_moe

    if impl != "vllm":
        from step_blocks import FoldedBlock, HandWrittenBlock

        qwen2_moe.Qwen2MoeSparseMoeBlock = FoldedBlock if impl == "folded" else HandWrittenBlock
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=128,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
    )
    runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner  # type: ignore[union-attr]
    forward, events = runner._model_forward, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = forward(*args, **kwargs)
        end.record()
        events.append((begin, end))
        return result

    runner._model_forward = timed
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        events.clear()
        generator = torch.Generator().manual_seed(job["seed"])
        batch, length = (job["tokens"], 8) if job["mode"] == "decode" else (1, job["tokens"])
        ids = torch.randint(3000, (batch, length), generator=generator).tolist()
        count = STEPS if job["mode"] == "decode" else 1
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - started) * 1e6 / len(events)
        times = [begin.elapsed_time(end) * 1e3 for begin, end in events]
        chosen = times[5:] if job["mode"] == "decode" else times
        print(json.dumps({"device": statistics.median(chosen), "wall": wall}), file=out, flush=True)


class Engine:
    """A child process with one engine."""

    def __init__(self, impl: str, folder: str, caches: str) -> None:
        environ = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_CACHE_ROOT": f"{caches}/{impl}",
        }
        command = [sys.executable, __file__, "--child", impl, "--folder", folder]
        log = open(f"{caches}/{impl}.log", "w")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environ)

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended; see its log")
        return line

    def ask(self, **job: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.answer())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--caches", help="where compile caches and logs go; a temporary folder by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return
    from gpu_machine import describe, machine_name
    from talker_model import config

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        caches = arguments.caches or temporary
        Path(caches).mkdir(exist_ok=True)
        config(arguments.layers).save_pretrained(f"{temporary}/model")
        engines = {}
        for impl in arguments.impls:
            engines[impl] = Engine(impl, f"{temporary}/model", caches)
        for impl, engine in engines.items():
            if engine.answer().strip() != "ready":
                raise SystemExit(f"{impl}: not ready")
            print(impl, "ready", flush=True)
        for mode, numbers in (("decode", DECODE), ("prefill", PREFILL)):
            for tokens in numbers:
                found: dict[str, list[dict[str, float]]] = {impl: [] for impl in engines}
                rounds = arguments.rounds if mode == "decode" else 3 * arguments.rounds
                for seed in range(-1, rounds):
                    for impl, engine in engines.items():
                        sample = engine.ask(mode=mode, tokens=tokens, seed=seed % 1000)
                        if seed >= 0:
                            found[impl].append(sample)
                for impl, samples in found.items():
                    device, wall = (statistics.median(s[key] for s in samples) for key in ("device", "wall"))
                    row = {"impl": impl, "mode": mode, "tokens": tokens, "us": round(device, 1)}
                    rows.append({**row, "wall_us": round(wall, 1)})
                    print(rows[-1], flush=True)
        for engine in engines.values():
            engine.process.kill()
    command = " ".join(["python", "benchmarks/step.py", *sys.argv[1:]])
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{machine_name()}-step.json"
    result = {**describe(), "command": command, "layers": arguments.layers, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
