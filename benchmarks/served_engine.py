"""One engine of benchmarks/served.py in a process of its own: started, asked for tokens, and timed.

python benchmarks/served_engine.py JOB     # a line of JSON for the start, then one for each line of stdin
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 64
PROMPTS = [[11, 5, 90, 241, 77], [100, 2, 2, 64], list(range(3, 60)), [400, 8, 15, 16, 23, 42]]


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine, and what is to be told of its start: the sites' outcomes and proofs, if there was surgery."""
    import vllm

    import moe_surgery

    handle = None if job["run"] is None else moe_surgery.install(target=job["target"], run=job["run"], prove="all")
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": job["dtype"],
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.05,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    llm = vllm.LLM(job["folder"], **{**options, **job["options"]})
    told: dict[str, Any] = {"sites": []}
    if handle is not None:
        handle.check()
        told["sites"] = handle.receipts()[0].report["sites"]  # type: ignore[index]
        told["ledger"] = handle.receipts()[0].ledger
    return llm, told


def tokens(llm: Any, adapter: str | None) -> list[dict[str, Any]]:
    """Greedy tokens of every prompt, and how far the second likeliest was from each."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=2)
    asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    request = None if adapter is None else LoRARequest(Path(adapter).name, abs(hash(adapter)) % 1000 + 1, adapter)
    answers = []
    for result in llm.generate(asked, greedy, use_tqdm=False, lora_request=request):
        best = [sorted((at.logprob for at in step.values()), reverse=True) for step in result.outputs[0].logprobs]
        gaps = [two[0] - two[1] for two in best]
        answers.append({"tokens": list(result.outputs[0].token_ids), "gaps": gaps})
    return answers


def decode(llm: Any) -> list[float]:
    """Seconds of a decoding step of one sequence: of what :data:`STEPS` more steps take longer, a few times."""
    from vllm import SamplingParams

    def seconds(steps: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=1 + steps, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    seconds(STEPS)
    return [(seconds(1 + STEPS) - seconds(1)) / STEPS for _ in range(3)]


def main(line: str) -> None:
    job = json.loads(line)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print goes to stderr
        bench = None
        try:
            llm, told = start(job)
            if job["timed"] and job["options"].get("tensor_parallel_size", 1) == 1:
                from moe_surgery.engine.timing.one_engine import Bench

                bench = Bench(llm)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=out, flush=True)
        for request in sys.stdin if "error" not in told else ():
            asked = json.loads(request)
            try:
                if "decode" in asked and bench is not None:
                    answer: Any = statistics.median(bench.answer(1, 32, STEPS).device)
                elif "decode" in asked:
                    answer = statistics.median(decode(llm))
                else:
                    answer = tokens(llm, asked["adapter"])
                print(json.dumps({"answer": answer}), file=out, flush=True)
            except Exception as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
