"""Runs vLLM engines on the example models of examples/engine in a process of their own, nothing installed."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import re
import tomllib
import traceback
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hanging import HANG
from own_process import run_apart

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "examples" / "engine"
PROMPTS = [[3, 17, 90, 41, 5], [100, 2, 2, 64]]


def plugin_path(tmp: Path) -> str:
    """A PYTHONPATH that shows child processes all plugin packages and their entry points, as if they were installed.

    The metadata is written into ``tmp``, from the packages' own pyproject files. Such processes also collect garbage
    seldom, as what they import makes millions of objects that stay: walking these took a fifth of an engine's start.
    """
    folders = [tmp]
    tmp.mkdir(parents=True, exist_ok=True)
    (tmp / "sitecustomize.py").write_text("import gc\n\ngc.set_threshold(100_000)\n", encoding="utf-8")
    for file in sorted(PACKAGES.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project["version"]
        info = tmp / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines: list[str] = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        folders.append(file.parent)
    info = tmp / "engine_faults-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-faults\nVersion: 0\n", encoding="utf-8")
    faults = "[vllm.general_plugins]\nengine_faults = engine_faults:activate\n"
    (info / "entry_points.txt").write_text(faults, encoding="utf-8")
    folders.append(Path(__file__).parent)
    return os.pathsep.join(map(str, folders))


def environment(tmp: Path, **more: str) -> dict[str, str]:
    """This process's environment, with the example models to be seen, and one thread for each process of an engine.

    Two engines may run at a time, and threads that are bound to the same cores wait for each other.
    """
    paths = [plugin_path(tmp / "plugins"), os.environ.get("PYTHONPATH")]
    alone = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **more}


@dataclass(frozen=True)
class Output:
    """Of one prompt: greedy tokens, their log-probabilities, and those of the prompt's tokens but the first."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def distance(found: list[float], wanted: list[float]) -> float:
    """The root of the mean square difference of log-probabilities."""
    return math.sqrt(sum((one - other) ** 2 for one, other in zip(found, wanted, strict=True)) / len(wanted))


@dataclass(frozen=True)
class Run:
    """An engine to start: ``options`` go to ``vllm.LLM``, ``surgery`` to ``moe_surgery.install`` if it isn't None.

    In ``surgery``, ``plan`` is the path of one. ``fault`` names what goes wrong in that process, or on one rank (see
    ``engine_faults``). Unless ``ask``, the engine is only started. The weights of the checkpoint ``push`` are pushed in
    the ``ways``, or in all (see ``engine_pushes``), and it is asked after each. ``guarded`` is a run without surgery
    whose error is a result too. Engines on the checkpoints ``before`` come and go under the same hook before the one
    that is told of. ``wrapped`` ends the paths of layers that are wrapped before the engine is asked (see
    ``engine_wrapped``). ``sleeps`` has the engine sleep with its weights kept, wake up, and be asked once more.
    It is asked for what follows ``prompts``, or :data:`PROMPTS` if there are none. Where ``load_format`` is dummy,
    ``scaled`` draws matrices that keep the scale of their input, and norms that do nothing.
    """

    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    surgery: dict[str, Any] | None = None
    fault: str | None = None
    ask: bool = True
    push: str | None = None
    ways: tuple[str, ...] = ()
    guarded: bool = False
    before: tuple[str, ...] = ()
    wrapped: tuple[str, ...] = ()
    sleeps: bool = False
    prompts: tuple[tuple[int, ...], ...] = ()
    scaled: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a run: its outputs, or the error that the engine didn't start with; and the receipts left.

    ``pushes`` is what each way of pushing weights ended with, and what was answered after it; where it was taken, also
    what was after the old ones were pushed back.
    """

    outputs: list[Output]
    receipts: list[dict[str, Any]]
    error: str | None = None
    pushes: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[tuple[str, str]]:
        """Path and outcome of every site, as the first receipt has them."""
        return [(site["path"], site["outcome"]) for site in (self.receipts[0]["report"] or {"sites": []})["sites"]]


def run_all(runs: list[Run], tmp: Path, forked: bool = False, **env: str) -> list[Result]:
    """The result of each run, one engine after the other, in one process of their own.

    The engine is of that process too, so that it starts in seconds, unless it is ``forked``, as vLLM does on GPUs, or
    an environment variable says otherwise: then its processes start anew, as vLLM has it on CPUs.
    """
    out = tmp / "results.json"
    env = {**environment(tmp, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(forked))), **env}
    write = _write_results_of_forks if forked else _write_results
    run_apart(write, runs, out, env=env, log=tmp / "log.txt", seconds=HANG * len(runs))
    results = json.loads(out.read_text(encoding="utf-8"))
    return [Result(**{**result, "outputs": [Output(**output) for output in result["outputs"]]}) for result in results]


def generate(runs: list[Run], tmp: Path, **env: str) -> list[list[Output]]:
    """The outputs for :data:`PROMPTS` of each run, all of which must start."""
    results = run_all(runs, tmp, **env)
    assert [result.error for result in results if result.error is not None] == []
    return [result.outputs for result in results]


def _write_results(runs: list[Run], out: Path) -> None:
    out.write_text(json.dumps([asdict(_result(run)) for run in runs]), encoding="utf-8")


def _write_results_of_forks(runs: list[Run], out: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with patch.object(multiprocessing, "get_context", lambda method=None: fork):
        _write_results(runs, out)


def _result(run: Run) -> Result:
    pushes: dict[str, list[Any]] = {}
    if run.surgery is None:
        try:
            return Result(_outputs(run, pushes), [])
        except Exception as failure:
            if not run.guarded:
                raise
            return Result([], [], _deciding(failure))
    from engine_faults import VARIABLE, faulty

    import moe_surgery
    from moe_surgery.engine.receipts import read_all

    surgery = dict(run.surgery)
    if "plan" in surgery:
        surgery["plan_or_packs"] = moe_surgery.Plan.load(surgery.pop("plan"))
    of_one_rank = {VARIABLE: run.fault} if run.fault and "@" in run.fault else {}
    fault = None if of_one_rank else run.fault
    with patch.dict(os.environ, of_one_rank), faulty(fault), moe_surgery.install(**surgery) as handle:
        try:
            for folder in run.before:
                _outputs(replace(run, folder=folder), {})
            outputs, error = _outputs(run, pushes), None
        except Exception as failure:
            outputs, error = [], _deciding(failure)
        if error is None:
            handle.check()
        return Result(outputs, [receipt.to_json() for receipt in read_all(handle.run)], error, pushes)


def _deciding(failure: BaseException) -> str:
    """What kept an engine from starting; of a class that can't be imported, why not."""
    if architecture := re.search(r"architectures \['(\w+)'\] failed to be inspected", str(failure)):
        from vllm import ModelRegistry

        try:
            ModelRegistry.models[architecture[1]].load_model_cls()
        except Exception as error:
            failure = error
    line = str(failure) or traceback.extract_tb(failure.__traceback__)[-1].line
    return f"{type(failure).__name__}: {line}"


def _ask(llm: Any, prompts: list[list[int]]) -> list[Output]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    outputs = []
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    for result in llm.generate(asked, greedy, use_tqdm=False):
        completion = result.outputs[0]
        tokens = list(completion.token_ids)
        prompt = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
        outputs.append(
            Output(
                tokens=tokens,
                logprobs=[at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True)],
                prompt_logprobs=[at[token].logprob for token, at in prompt],
            )
        )
    return outputs


def _answers(llm: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [asdict(output) for output in _ask(llm, prompts)]


def _scaled(fill: Any, parameter: Any) -> None:
    if parameter.ndim > 1:
        bound = (3 / parameter.shape[-1]) ** 0.5
        fill(parameter, low=-bound, high=bound)
    else:
        fill(parameter, low=1, high=1)


def _outputs(run: Run, pushes: dict[str, list[Any]]) -> list[Output]:
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor import model_loader

    own_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0"
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "kv_cache_memory_bytes": 1 << 26,
        "enforce_eager": True,
        "disable_log_stats": True,
        **({"gpu_memory_utilization": 0.05} if torch.cuda.is_available() else {}),
        **({} if own_process else {"distributed_executor_backend": "uni"}),
    }
    if run.push is not None:
        from engine_pushes import TRANSFER, push, register

        register()
        defaults["weight_transfer_config"] = {"backend": TRANSFER}
    llm = None
    fill = model_loader.dummy_loader.initialize_single_dummy_weight
    try:
        # vLLM's own random weights are so small that no part of a model does anything.
        drawn = partial(_scaled, fill) if run.scaled else partial(fill, low=-0.3, high=0.3)
        model_loader.dummy_loader.initialize_single_dummy_weight = drawn
        llm = LLM(run.folder, **{**defaults, **run.options})
        prompts = ([list(prompt) for prompt in run.prompts] or PROMPTS) if run.ask else []
        if run.wrapped:
            from engine_wrapped import wrap

            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            assert wrap(worker.get_model(), tuple(run.wrapped)) > 0
        outputs = _ask(llm, prompts)
        if run.push is not None:
            asking = partial(_answers, llm, prompts)
            pushes |= push(llm, asking, tuple(run.ways), Path(run.folder), Path(run.push))
        if run.sleeps:
            llm.sleep(level=1)
            llm.wake_up()
            outputs += _ask(llm, prompts)
        return outputs
    finally:
        model_loader.dummy_loader.initialize_single_dummy_weight = fill
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        llm = None
        gc.collect()
        if not own_process:
            cleanup_dist_env_and_memory()
