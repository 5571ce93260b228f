"""Blocks that vLLM has fused itself stay as they are on a CPU, unless they are to be folded; tokens are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import own_models
import pytest
from engine_examples import Run, run_all
from test_engine_folded import check_folded, folded
from test_engine_siblings import check_same

FAMILIES = {"qwen2_moe": "sigmoid gate", "glm4_moe": "its own top-2 of 8", "afmoe": "its own top-2 of 8"}
"""With what each block's reason says of it: a shared expert with a gate, groups, a correction bias of the block's."""


def sites_of(result: Any) -> list[dict[str, Any]]:
    sites: list[dict[str, Any]] = result.receipts[0]["report"]["sites"]
    return sites


@pytest.mark.slow
def test_folded_anew(tmp_path: Path) -> None:
    runs = []
    for name in FAMILIES:
        own_models.write(name, tmp_path / name)
        runs.append(folded(tmp_path / name, tmp_path, f"{name}-run"))
    results = run_all([*runs, *(replace(run, surgery=None) for run in runs)], tmp_path)
    for told, found, plain in zip(FAMILIES.values(), results[: len(runs)], results[len(runs) :], strict=True):
        check_folded(found)
        check_same(found, plain)
        assert all(told in site["reason"] for site in sites_of(found))


@pytest.mark.slow
def test_kept_where_nothing_else_is_asked(tmp_path: Path) -> None:
    """Or where the block can't be folded, which is said."""
    own_models.write("qwen2_moe", tmp_path / "model")
    own_models.write("llama4", tmp_path / "other")
    runs = [
        Run(str(tmp_path / "model"), {}, {"run": str(tmp_path / each), "target": each}) for each in ("auto", "vllm")
    ]
    *kept, other = run_all([*runs, folded(tmp_path / "other", tmp_path, "folded")], tmp_path)
    for result in kept:
        assert {(site["outcome"], site["reason"]) for site in sites_of(result)} == {("kept", "already fused")}
    [(outcome, reason)] = {(site["outcome"], site["reason"]) for site in sites_of(other)}
    assert (
        outcome == "kept" and reason.startswith("already fused · not folded: ") and "on its experts' inputs" in reason
    )


@pytest.mark.slow
def test_two_ranks_reduce_the_sum_once(tmp_path: Path) -> None:
    own_models.write("qwen2_moe", tmp_path / "model")
    run = folded(tmp_path / "model", tmp_path, "run")
    [found] = run_all([replace(run, options={"tensor_parallel_size": 2})], tmp_path, forked=True)
    [plain] = run_all([Run(run.folder)], tmp_path, forked=True)
    check_folded(found, ranks=2)
    check_same(found, plain)
