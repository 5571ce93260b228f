"""One engine whose steps are timed, in a process of its own.

    python -m moe_surgery.engine.timing.one_engine JSON OUT

What is timed is the model runner's forward of the model, for all sequences of a step together: between CUDA events on a
GPU, where that is the device's own time as long as a step is one graph, and by the clock on a CPU. Scheduling, sampling
and the front end are not in it. The engine is of this process, so it has one rank.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from moe_surgery.engine.timing.both_engines import CONTEXT, Job, Timed, Told
from moe_surgery.errors import SurgeryError, UnsupportedError

STEPS, CALLS = 30, 10
"""How many decoding steps, and how many prefills, are timed if two seconds are enough for them."""
_SECONDS, _FEWEST, _WARM_UP = 2.0, 5, 4
_KV_CACHE = 1 << 30


def serve(job: Job) -> Told:
    """Start the engine, and measure; nothing is measured if surgery was asked for and replaced nothing.

    Raises :class:`UnsupportedError` if the engine doesn't start, and not because of surgery.
    """
    import vllm

    import moe_surgery

    handle = None if job.run is None else moe_surgery.install(job.packs, target=job.target, run=job.run)
    try:
        engine = _start(vllm, job)
    except Exception as error:
        if handle is not None and handle.receipts():
            handle.check()
        reason = shorten(str(error), 200, placeholder=" …")
        raise UnsupportedError(
            f"vLLM {vllm.__version__} can't serve {job.model}: {type(error).__name__}: {reason}"
        ) from error
    report = None
    if handle is not None:
        handle.check()
        report = handle.receipts()[0].report
        assert report is not None
        if all(site["outcome"] != "replaced" for site in report["sites"]):
            return Told((), report)
    return Told(_Bench(engine).measure(job), report)


def _start(vllm: Any, job: Job) -> Any:
    longest = max(CONTEXT + STEPS + _WARM_UP, *(tokens + 1 for tokens in job.prefill), 64)
    at_once = max(*job.sequences, 1)
    return vllm.LLM(
        job.model,
        skip_tokenizer_init=True,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
        enforce_eager=job.eager,
        max_model_len=longest,
        max_num_seqs=at_once,
        max_num_batched_tokens=max(longest, at_once * CONTEXT),
        kv_cache_memory_bytes=_KV_CACHE,
        enable_prefix_caching=False,
        disable_log_stats=True,
        distributed_executor_backend="uni",
    )


class _Bench:
    """Asks one engine, and collects the seconds of each forward of its model."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._marks: list[tuple[Any, Any]] = []
        self._seed = itertools.count()
        [self._vocabulary] = engine.collective_rpc(self._watch)

    def _watch(self, worker: Any) -> int:
        """Wrap the forward of the worker's model, graphs included. Returns the size of the vocabulary."""
        runner = worker.model_runner
        forward: Callable[..., Any] | None = getattr(runner, "_model_forward", None)
        if forward is None:
            raise UnsupportedError(f"{type(runner).__name__} runs its model in a way that can't be timed here")
        mark = _event if torch.cuda.is_available() else time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = mark()
            result = forward(*args, **kwargs)
            self._marks.append((begin, mark()))
            return result

        runner._model_forward = timed
        return int(runner.model_config.get_vocab_size())

    def _ask(self, sequences: int, tokens: int, count: int) -> list[float]:
        """Continue random prompts by ``count`` tokens; seconds of the prefill and of each step after it."""
        from vllm import SamplingParams

        self._marks.clear()
        generator = torch.Generator().manual_seed(next(self._seed))
        ids = torch.randint(self._vocabulary, (sequences, tokens), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.engine.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
        if len(self._marks) < count:
            raise SurgeryError(f"{len(self._marks)} forwards were seen where {count} were to be timed")
        return [_seconds(begin, end) for begin, end in self._marks[:count]]

    def measure(self, job: Job) -> tuple[Timed, ...]:
        steps = [self._decode(sequences) for sequences in job.sequences]
        return (*steps, *(self._prefill(tokens) for tokens in job.prefill))

    def _decode(self, sequences: int) -> Timed:
        rough = self._ask(sequences, CONTEXT, 1 + _WARM_UP)[-1]
        seconds = self._ask(sequences, CONTEXT, 1 + _fit(rough, STEPS))[1:]
        return Timed("decode step", 1, sequences, len(seconds), statistics.median(seconds))

    def _prefill(self, tokens: int) -> Timed:
        [rough] = self._ask(1, tokens, 1)
        seconds = [self._ask(1, tokens, 1)[0] for _ in range(_fit(rough, CALLS))]
        return Timed("prefill", tokens, 1, len(seconds), statistics.median(seconds))


def _fit(seconds: float, most: int) -> int:
    return min(most, max(int(_SECONDS / seconds), _FEWEST))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def main(job: str, out: str) -> None:
    try:
        told = serve(Job(**{key: _tuple(value) for key, value in json.loads(job).items()}))
    except SurgeryError as error:
        told = Told((), None, str(error), error.exit_code)
    Path(out).write_text(json.dumps(asdict(told)), encoding="utf-8")
    # Engines end in their own time, or not at all; all that they were started for is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main(*sys.argv[1:])
