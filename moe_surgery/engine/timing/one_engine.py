"""One engine whose steps are timed, in a process of its own.

    python -m moe_surgery.engine.timing.one_engine JOB

It says on stdout, as one line of JSON, what surgery did, or with which error it ended. Then each line of stdin asks for
one measurement, and gets one line.

What is timed is the model runner's forward of the model, for all sequences of a step together: between CUDA events on a
GPU, where that is the device's own time as long as a step is one graph, and by the clock on a CPU. The wall time is
that of whole engine steps, scheduling and sampling included. The engine is of this process, so it has one rank.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch

from moe_surgery.engine.timing.asking import CONTEXT, Job, Times
from moe_surgery.errors import SurgeryError, UnsupportedError

_KV_CACHE = 1 << 30
_LEAST_OF_THE_GPU = 0.05
"""Of its memory must be free at the start; how much is used depends on the model and the cache alone."""


def start(job: Job) -> tuple[Bench | None, dict[str, Any] | None]:
    """The engine, and the report of the surgery if there was any; no engine to measure if it replaced nothing.

    Raises :class:`UnsupportedError` if the engine doesn't start, and not because of surgery.
    """
    import vllm

    import moe_surgery

    handle = None
    if job.run is not None:
        handle = moe_surgery.install(job.packs, target=job.target, run=job.run, prove=job.prove)
    try:
        engine = _engine(vllm, job)
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
            return None, report
    _share_a_core()
    return Bench(engine), report


def _share_a_core() -> None:
    """Have this thread, which launches everything, run where the other engines' threads do that are asked in turns.

    On virtual machines some cores are slower than others by half, and what a core has, a process may keep for long.
    """
    if torch.cuda.is_available() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _engine(vllm: Any, job: Job) -> Any:
    longest = max(CONTEXT + job.most_steps, *(tokens + 1 for tokens in job.prefill), 64)
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
        **({"gpu_memory_utilization": _LEAST_OF_THE_GPU} if torch.cuda.is_available() else {}),
    )


class Bench:
    """Asks one engine, and collects the times of each forward of its model."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._marks: list[tuple[Any, Any]] = []
        self._begun: list[float] = []
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
            self._begun.append(time.perf_counter())
            begin = mark()
            result = forward(*args, **kwargs)
            self._marks.append((begin, mark()))
            return result

        runner._model_forward = timed
        return int(runner.model_config.get_vocab_size())

    def answer(self, sequences: int, tokens: int, steps: int) -> Times:
        """Continue random prompts: the times of a prefill if ``steps`` is 0, else those of the decoding steps after."""
        from vllm import SamplingParams

        self._marks.clear()
        self._begun.clear()
        generator = torch.Generator().manual_seed(next(self._seed))
        ids = torch.randint(self._vocabulary, (sequences, tokens), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=1 + steps, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self.engine.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
        ended = time.perf_counter()
        if len(self._marks) < 1 + steps:
            raise SurgeryError(f"{len(self._marks)} forwards were seen where {1 + steps} were to be timed")
        device = [_seconds(begin, end) for begin, end in self._marks[: 1 + steps]]
        if steps == 0:
            return Times(device, [ended - started])
        begun = [*self._begun[1 : 1 + steps], ended]
        return Times(device[1:], [after - before for before, after in itertools.pairwise(begun)])


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def main(job: str) -> None:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print goes to stderr

        def tell(**data: Any) -> None:
            print(json.dumps(data), file=out, flush=True)

        try:
            bench, report = start(Job.from_json(json.loads(job)))
            tell(report=report)
            for line in sys.stdin if bench is not None else ():
                assert bench is not None
                tell(**vars(bench.answer(**json.loads(line))))
        except SurgeryError as error:
            tell(error=str(error), exit_code=error.exit_code)
    # Engines end in their own time, or not at all; all that they were started for is told.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
