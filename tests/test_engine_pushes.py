"""Weights that are pushed into an operated engine are taken up whole, or refused with the old ones in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.make_checkpoint import make
from engine_examples import Output, Result, Run, run_all
from engine_pushes import BROKEN, SHUT, TAKEN
from own_models import write
from torch import nn

EVERYTHING = (("naive_talker", "folded"), ("list_moe", "vllm"))
"""Routed experts of vLLM's, copied for the shared one to be folded into them; and experts that were a list."""
OTHERS = (
    ("naive_talker", "vllm"),
    ("omni_talker", "vllm"),
    ("omni_talker", "folded"),
    ("unfused_qwen2", "vllm"),
    ("unfused_qwen2", "folded"),
    ("unfused_deepseek", "vllm"),
    ("unfused_deepseek", "folded"),
    ("list_moe", "folded"),
    ("list_moe_whole", "vllm"),
    ("list_moe_whole", "folded"),
)
SOME = ("load_weights", "load_weights without vectors", "reload_weights by path", "a missing shard")


def outputs(answers: list[dict[str, Any]]) -> list[Output]:
    return [Output(**answer) for answer in answers]


def check(result: Result, other: Result) -> None:
    """That each way told the truth of what it did; ``other`` is an engine that was started on what was pushed."""
    assert result.error is None and other.error is None
    assert result.outputs != other.outputs
    for way, (told, after, *back) in result.pushes.items():
        if way in TAKEN:
            assert told == "pushed", (way, told)
            assert outputs(after) == other.outputs, way  # to the last bit
            assert outputs(back[0]) == result.outputs, way
        else:
            assert told != "pushed" and "nothing was changed" in told and "\n" not in told, (way, told)
            assert outputs(after) == result.outputs, way


def check_tokens(result: Result, plain: Result) -> None:
    """That an engine without surgery says the same; what is folded is summed up in another order."""
    for output, expected in zip(result.outputs, plain.outputs, strict=True):
        assert output.tokens == expected.tokens
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with other weights, by kind."""
    root = tmp_path_factory.mktemp("pushed")
    kinds = {kind for kind, _ in (*EVERYTHING, *OTHERS)}
    for kind in kinds:
        make(kind, root / kind, seed=1)
    return {kind: root / kind for kind in kinds}


def runs(kind: str, target: str, folder: Path, other: Path, tmp: Path, ways: tuple[str, ...] = ()) -> list[Run]:
    """One into which the other weights are pushed, and one that starts with them."""
    surgery = {"run": str(tmp / f"{kind}-{target}"), "target": target}
    pushed = Run(str(folder), {}, surgery, push=str(other), ways=ways)
    return [pushed, Run(str(other), {}, {**surgery, "run": f"{surgery['run']}-other"})]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), EVERYTHING)
def test_every_way(kind: str, target: str, folders: dict[str, Path], others: dict[str, Path], tmp_path: Path) -> None:
    """The first engine of the process is the one that is pushed into."""
    started = runs(kind, target, folders[kind], others[kind], tmp_path)
    result, other, plain = run_all([*started, Run(str(others[kind]))], tmp_path)
    assert result.error is None
    assert result.pushes.keys() == {*TAKEN, *BROKEN, *SHUT}
    check(result, other)
    check_tokens(other, plain)


@pytest.mark.slow
def test_every_example(folders: dict[str, Path], others: dict[str, Path], tmp_path: Path) -> None:
    started = [
        run for kind, target in OTHERS for run in runs(kind, target, folders[kind], others[kind], tmp_path, SOME)
    ]
    results = run_all(started, tmp_path)
    for result, other in zip(results[::2], results[1::2], strict=True):
        assert result.error is None and result.pushes.keys() == set(SOME)
        check(result, other)


class Hooked(nn.Module):
    def process_weights_after_loading(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "model", "reason"),
    [
        ({}, nn.Module(), None),
        ({"enforce_eager": False}, nn.Module(), "graphs"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, nn.Module(), "several processes"),
        ({"quantization": "fp8"}, nn.Module(), "quantised"),
        ({"enable_lora": True}, nn.Module(), "adapters"),
        ({}, Hooked(), "hook"),
    ],
)
def test_what_takes_no_weights(options: dict[str, Any], model: nn.Module, reason: str | None, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from moe_surgery.engine.model.push import not_taken

    write("granitemoeshared", tmp_path)
    args = EngineArgs(str(tmp_path), **{"skip_tokenizer_init": True, "enforce_eager": True, **options})
    told = not_taken(model, args.create_engine_config())
    assert told is None if reason is None else reason in str(told)
