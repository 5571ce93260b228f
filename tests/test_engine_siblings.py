"""A shared expert that stands beside its block, in the layer around it, is fused with it; tokens stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_examples import Result, Run, run_all
from engine_sweep import compare
from own_models import write
from test_engine_pushes import check as check_pushed

FAMILIES = ("granitemoeshared", "granitemoe_swa", "granitemoehybrid", "step3_text")


def operated(folder: Path, tmp: Path, name: str, **surgery: str) -> Run:
    return Run(str(folder), {}, {"run": str(tmp / name), "prove": "all", **surgery})


def check_fused(result: Result, target: str = "folded") -> None:
    assert result.error is None
    for receipt in result.receipts:
        assert receipt["outcome"] == "operated" and receipt["ledger"] is not None
        for site in receipt["report"]["sites"]:
            assert (site["outcome"], site["path"].split(".")[-1] in ("block_sparse_moe", "moe")) == ("replaced", True)
            assert site["spec"]["shared"]["width"] == 64 and site["target"] == target
            assert site["proof"]["passed"] and site["proof"]["margin"] > 5
        assert len(receipt["report"]["sites"]) == 2


def check_same(result: Result, plain: Result) -> None:
    for output, expected in zip(result.outputs, plain.outputs, strict=True):
        assert output.tokens == expected.tokens
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert output.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-4)


@pytest.mark.slow
def test_all_families(tmp_path: Path) -> None:
    """Each engine but the first ran after others; the first of each family is operated on."""
    runs = []
    for name in FAMILIES:
        write(name, tmp_path / name)
        runs += [operated(tmp_path / name, tmp_path, f"{name}-run"), Run(str(tmp_path / name))]
    runs.append(operated(tmp_path / "step3_text", tmp_path, "layer", target="vllm"))
    results = run_all(runs, tmp_path)
    for result, plain in zip(results[:-1:2], results[1::2], strict=True):
        check_fused(result)
        check_same(result, plain)
    check_fused(results[-1], "vllm")
    check_same(results[-1], results[-2])


@pytest.mark.slow
def test_two_ranks_reduce_the_sum_once(tmp_path: Path) -> None:
    write("granitemoeshared", tmp_path / "model")
    run = operated(tmp_path / "model", tmp_path, "run")
    runs = [Run(run.folder, {"tensor_parallel_size": 2}, run.surgery), Run(run.folder)]
    [result], [plain] = run_all([runs[0]], tmp_path, forked=True), run_all([runs[1]], tmp_path)
    check_fused(result)
    assert [receipt["rank"] for receipt in result.receipts] == [0, 1]
    check_same(result, plain)


@pytest.mark.slow
def test_the_transformers_backend_on_two_ranks(tmp_path: Path) -> None:
    write("ernie4_5_moe", tmp_path / "model")
    options = {"model_impl": "transformers", "tensor_parallel_size": 2}
    row = compare("ernie4_5_moe", tmp_path / "model", tmp_path, options, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert row.good, row
    assert (row.sites, row.model) == ("1 replaced", "TransformersMoEForCausalLM")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["folded", "vllm"])
def test_a_push_reaches_both(target: str, tmp_path: Path) -> None:
    """Or none, where the shared expert lacks a tensor that is to be laid out with those of its block."""
    for seed, name in enumerate(("model", "other")):
        write("granitemoeshared", tmp_path / name, seed)
    run = operated(tmp_path / "model", tmp_path, "run", target=target)
    other = operated(tmp_path / "other", tmp_path, "other-run", target=target)
    ways = ("load_weights", "without the shared expert", "reload_weights by path")
    [result, started] = run_all([Run(run.folder, {}, run.surgery, push=other.folder, ways=ways), other], tmp_path)
    check_fused(result, target)
    check_pushed(result, started)
