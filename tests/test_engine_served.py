"""Engines as they are served: blocks with quantised layers, adapters around layers, what is refused and why.

On x86 vLLM runs quantised linear layers, but no quantised routed experts: benchmarks/served.py has those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from engine.make_checkpoint import make
from engine_examples import Output, Run, run_all
from quantised_checkpoint import but, write

Change = Callable[[dict[str, torch.Tensor], str], object]


def lost(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors.pop(name, None)


def one(tensors: dict[str, torch.Tensor], name: str) -> None:
    """A scalar in the tensor's place."""
    if name in tensors:
        tensors[name] = tensors[name].flatten()[0]


SHARED = "model.layers.1.mlp.shared_expert"
HALF = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("models")
    for kind in ("naive_talker", "unfused_deepseek", "list_moe"):
        make(kind, tmp / kind, layers=2)
    for kind, form in (("naive_talker", "ct_int4"), ("unfused_deepseek", "ct_fp8_channel"), ("list_moe", "ct_int4")):
        write(tmp / kind, tmp / f"{kind}-{form}", form, ["shared"])
    return {path.name: path for path in tmp.iterdir()}


def operated(folder: Path, tmp: Path, name: str, **more: object) -> Run:
    surgery = {"run": str(tmp / name), "prove": "all"}
    return Run(str(folder), HALF, surgery, **more)  # type: ignore[arg-type]


def same(outputs: list[Output], expected: list[Output]) -> None:
    assert len(outputs) == len(expected) > 0
    for output, other in zip(outputs, expected, strict=True):
        assert output.tokens == other.tokens
        # Logits are in bfloat16: one rounding of a number below 8.
        torch.testing.assert_close(
            torch.tensor(output.prompt_logprobs), torch.tensor(other.prompt_logprobs), rtol=0, atol=8 * 2**-8
        )


@pytest.mark.slow
def test_blocks_with_a_quantised_shared_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    names = ("naive_talker-ct_int4", "unfused_deepseek-ct_fp8_channel")
    runs = [operated(folders[name], tmp_path, name) for name in names]
    wrong = operated(folders[names[0]], tmp_path, "wrong", fault="shared expert doubled")
    found = run_all([*runs, wrong, *(Run(str(folders[name]), HALF) for name in names)], tmp_path)
    for name, result, plain in zip(names, found, found[3:], strict=False):
        assert result.error is None, result.error
        for site in result.receipts[0]["report"]["sites"]:
            assert (site["outcome"], site["target"]) == ("replaced", "vllm"), (name, site)
            assert "CompressedTensorsLinearMethod" in site["reason"]
            proof = site["proof"]
            assert proof["passed"] and proof["reference"] == "parts" and proof["margin"] > 5, (name, proof)
            assert len(proof["mutants"]) >= 10
        same(result.outputs, plain.outputs)
    [receipt] = found[2].receipts
    assert (receipt["outcome"], receipt["exit_code"]) == ("failed", 12)
    assert "the new block is not what the spec says" in receipt["error"]


@pytest.mark.slow
def test_quantised_tensors_are_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    down, alone = f"{SHARED}s.down_proj.weight_scale", "model.layers.1.mlp.experts.3.up_proj.weight"
    cases: list[tuple[str, str, Change, str]] = [
        ("naive_talker-ct_int4", f"{SHARED}.up_proj.weight_packed", lost, "gate_up_proj.weight_packed: 1024 of 2048"),
        ("naive_talker-ct_int4", f"{SHARED}.down_proj.weight_scale", lost, "down_proj.weight_scale: never loaded"),
        ("unfused_deepseek-ct_fp8_channel", down, one, f"{down} [] can't be loaded into {down} [128, 1]: AssertionErr"),
        # vLLM's routed layer fills all of a matrix with it, without a word.
        ("naive_talker", alone, one, f"65536 elements were written where 61441 came, 1 of them as {alone}"),
    ]
    runs = []
    for number, (name, tensor, change, _) in enumerate(cases):
        folder = but(folders[name], tmp_path / str(number), partial(change, name=tensor))
        runs.append(operated(folder, tmp_path, f"run-{number}", ask=False))
    for (*_, words), result in zip(cases, run_all(runs, tmp_path), strict=True):
        [receipt] = result.receipts
        assert (receipt["outcome"], receipt["exit_code"]) == ("failed", 13), receipt["error"]
        assert words in receipt["error"], receipt["error"]


@pytest.mark.slow
def test_what_would_have_to_move_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    [result] = run_all([operated(folders["list_moe-ct_int4"], tmp_path, "run", ask=False)], tmp_path)
    assert result.error is None
    for site in result.receipts[0]["report"]["sites"]:
        assert site["outcome"] == "refused"
        assert "its weights are quantised (CompressedTensorsLinearMethod), and its experts would have" in site["reason"]


@pytest.mark.slow
def test_layers_that_are_wrapped_later_are_called(folders: dict[str, Path], tmp_path: Path) -> None:
    # The talker's router is called by vLLM's layer, which doesn't see what stands around it, with surgery or without.
    names = ("shared_expert.gate_up_proj", "shared_expert.down_proj", "mlp.shared_expert_gate")
    folder, deepseek = folders["naive_talker"], folders["unfused_deepseek"]
    asked = [(folder, (name,)) for name in names] + [(deepseek, ("mlp.gate",))]
    surgery = {"prove": "all", "target": "vllm"}
    runs = [
        Run(str(path), {}, {**surgery, "run": str(tmp_path / str(number))}, wrapped=wrapped)
        for number, (path, wrapped) in enumerate(asked)
    ]
    plain = [Run(str(path), {}, wrapped=wrapped) for path, wrapped in asked]
    *found, untouched = run_all([*runs, *plain, Run(str(folder))], tmp_path)
    for mine, theirs, (_, wrapped) in zip(found[: len(asked)], found[len(asked) :], asked, strict=True):
        assert mine.error is None, (wrapped, mine.error)
        assert {outcome for _, outcome in mine.steps} == {"replaced"}
        for output, expected in zip(mine.outputs, theirs.outputs, strict=True):
            torch.testing.assert_close(
                torch.tensor(output.prompt_logprobs), torch.tensor(expected.prompt_logprobs), rtol=0, atol=1e-4
            )
        # Each wrapper shows, or the comparison would tell nothing.
        apart = torch.tensor(mine.outputs[0].prompt_logprobs) - torch.tensor(untouched.outputs[0].prompt_logprobs)
        assert float(apart.abs().max()) > 1e-3, wrapped
