"""Engines with experts in FP8, a scale for each 128 by 128 or each row: folded, proven, all scales accounted for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from engine_examples import Result, Run, run_all
from quantised_checkpoint import but, without
from quantised_checkpoint import write as quantised

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

KINDS = {"naive_talker": 16, "unfused_deepseek": 64}
OPTIONS = {"dtype": "bfloat16", "max_model_len": 256}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products of e4m3"
    ),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from served_checkpoint import write

    tmp = tmp_path_factory.mktemp("stored")
    for kind, experts in KINDS.items():
        write(kind, tmp / f"{kind}-source", 2, experts)
        quantised(tmp / f"{kind}-source", tmp / kind, "fp8_block", group=128)
        quantised(tmp / f"{kind}-source", tmp / f"{kind} by row", "ct_fp8_channel")
    quantised(tmp / "naive_talker-source", tmp / "experts alone", "fp8_block", ["experts"], group=128)
    return {path.name: path for path in tmp.iterdir()}


def operated(folder: Path, run: Path, target: str = "auto", **more: object) -> Run:
    surgery = {"run": str(run), "prove": "all", "target": target}
    return Run(str(folder), {**OPTIONS, **more.pop("options", {})}, surgery, **more)  # type: ignore[dict-item, arg-type]


def sites(result: Result) -> list[dict[str, object]]:
    assert result.error is None
    found: list[dict[str, object]] = result.receipts[0]["report"]["sites"]
    return found


@pytest.mark.parametrize("scales", ["", " by row"], ids=["blocks", "rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_folded(kind: str, scales: str, eager: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run = operated(checkpoints[kind + scales], tmp_path / "run", options={"enforce_eager": eager})
    [result] = run_all([run], tmp_path)
    for site in sites(result):
        assert (site["outcome"], site["target"]) == ("replaced", "folded")
        proof = site["proof"]
        assert isinstance(proof, dict)
        assert proof["passed"] and proof["reference"] == "weights" and proof["margin"] > 5
    assert len(sites(result)) == 2


def test_a_block_that_is_wrong_with_vllms_layer_alone_is_noticed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With a scale for each row that layer computes all but few tokens; the kernels have no part in the fault."""
    folder, fault = checkpoints["naive_talker by row"], "shared expert doubled"
    run = operated(folder, tmp_path / "run", "folded", ask=False, fault=fault)
    [result] = run_all([run], tmp_path)
    [receipt] = result.receipts
    assert receipt["outcome"] == "failed"
    assert "with vLLM's layer: the new block is not what the spec says" in receipt["error"]


def test_a_block_with_an_expert_that_nothing_chooses_is_left_to_vllms_layer(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def shut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -3.0  # more than what scores differ by

    folder = but(checkpoints["unfused_deepseek"], tmp_path / "model", shut)
    [result] = run_all([operated(folder, tmp_path / "run")], tmp_path)
    for site in sites(result):  # both, as they are of one kind
        assert (site["outcome"], site["target"]) == ("replaced", "vllm")
        assert "not folded, as it can't be proven: no probe is surely routed to expert 5" in str(site["reason"])
        proof = site["proof"]
        assert isinstance(proof, dict) and proof["passed"] and proof["reference"] == "parts"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_few_tokens_experts_are_not_sorted(
    kind: str, eager: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """What Marlin's kernels make of one, of the most and of one more is proven; a fault there shows.

    Three prompts at a time don't fill the graph that they are decoded by.
    """
    folder, options = tmp_path / "int4", {"enforce_eager": eager}
    quantised(checkpoints[f"{kind}-source"], folder, "ct_int4", group=128)
    fault = operated(folder, tmp_path / "fault", ask=False, options=options, fault="few tokens' experts exchanged")
    right = operated(folder, tmp_path / "run", options=options, prompts=((3, 17, 90), (100, 2), (5, 41)))
    result, *wrong = run_all([right, fault] if eager else [right], tmp_path)
    for site in sites(result):
        assert (site["outcome"], site["target"]) == ("replaced", "vllm")
        proof = site["proof"]
        assert isinstance(proof, dict) and proof["passed"] and proof["reference"] == "parts" and proof["margin"] > 5
    for each in wrong:
        [receipt] = each.receipts
        assert receipt["outcome"] == "failed" and "the new block is not what the spec says" in receipt["error"]


def test_a_shared_expert_that_is_stored_otherwise(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    [result] = run_all([operated(checkpoints["experts alone"], tmp_path / "run", ask=False)], tmp_path)
    for site in sites(result):
        assert (site["outcome"], site["target"]) == ("replaced", "vllm")
        assert "its shared expert isn't stored as the routed ones are" in str(site["reason"])


def test_a_scale_that_is_missing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    folder = without(checkpoints["unfused_deepseek"], lost, tmp_path / "model")
    [result] = run_all([operated(folder, tmp_path / "run", ask=False)], tmp_path)
    [receipt] = result.receipts
    assert (receipt["outcome"], receipt["exit_code"]) == ("failed", 13)
    assert "w13_weight_scale_inv" in receipt["error"] and "in expert 3" in receipt["error"]
