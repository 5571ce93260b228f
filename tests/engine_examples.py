"""Runs the example vLLM models of examples/engine in processes of their own, without installing their packages.

python tests/engine_examples.py JSON     # what :func:`generate` starts
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "examples" / "engine"
PROMPTS = [[3, 17, 90, 41, 5], [100, 2, 2, 64]]


def plugin_path(tmp: Path) -> str:
    """A PYTHONPATH that shows child processes all plugin packages and their entry points, as if they were installed.

    The metadata is written into ``tmp``, from the packages' own pyproject files.
    """
    folders = [tmp]
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
    return os.pathsep.join(map(str, folders))


@dataclass(frozen=True)
class Output:
    """Of one prompt: greedy tokens, their log-probabilities, and those of the prompt's tokens but the first."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


@dataclass(frozen=True)
class Run:
    """An engine to start: ``options`` go to ``vllm.LLM``."""

    folder: str
    options: dict[str, Any] = field(default_factory=dict)


def generate(runs: list[Run], tmp: Path, *, environment: dict[str, str] | None = None) -> list[list[Output]]:
    """The outputs for :data:`PROMPTS` of each run, one engine after the other, in one child process of the caller's."""
    out = tmp / "outputs.json"
    paths = [plugin_path(tmp / "plugins"), os.environ.get("PYTHONPATH")]
    child = subprocess.run(
        [sys.executable, __file__, json.dumps([asdict(run) for run in runs]), str(out)],
        env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if child.returncode:
        raise AssertionError(f"the engine process ended with {child.returncode}\n{child.stdout}\n{child.stderr}")
    return [[Output(**output) for output in outputs] for outputs in json.loads(out.read_text(encoding="utf-8"))]


def _outputs(run: Run) -> list[Output]:
    from vllm import LLM, SamplingParams

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "kv_cache_memory_bytes": 1 << 26,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    llm = LLM(run.folder, **{**defaults, **run.options})
    greedy = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    outputs = []
    for result in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False):
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
    llm.llm_engine.engine_core.shutdown()
    return outputs


if __name__ == "__main__":
    results = [[asdict(output) for output in _outputs(Run(**run))] for run in json.loads(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
