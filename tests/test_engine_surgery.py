"""Engines that are operated on compute what transformers computes, however they run, and tell what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.make_checkpoint import CONFIGS, make
from engine_examples import Result, Run, run_all
from engine_reference import check, reference

LAYERS = 3
SITES = [(f"model.layers.{layer}.mlp", "replaced") for layer in range(LAYERS)]
# Prompts of five and four tokens then take two steps each, beside the other's decoding.
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 3, "max_num_seqs": 2}
COMPILED = {"enforce_eager": False}


def operated(folder: Path, tmp: Path, name: str, **options: Any) -> Run:
    return Run(str(folder), options, {"run": str(tmp / name), "prove": "all"})


def check_operated(result: Result, ranks: int = 1) -> None:
    """Every rank replaced and proved every block, and accounts for every weight."""
    assert result.steps == SITES
    assert [receipt["rank"] for receipt in result.receipts] == list(range(ranks))
    for receipt in result.receipts:
        assert receipt["outcome"] == "operated" and receipt["ledger"] is not None
        for site in receipt["report"]["sites"]:
            assert site["proof"]["passed"] and site["proof"]["margin"] > 5
            assert len(site["proof"]["mutants"]) >= 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine-models")
    for kind in CONFIGS:
        make(kind, root / kind)
    make("unfused_qwen2", root / "stacked", fused=True)
    return {kind: root / kind for kind in [*CONFIGS, "stacked"]}


@pytest.mark.slow
def test_eager_and_with_chunked_prefill(folders: dict[str, Path], tmp_path: Path) -> None:
    kinds = list(folders)
    runs = [operated(folders[kind], tmp_path, kind) for kind in kinds]
    runs += [operated(folders[kind], tmp_path, f"{kind}-chunked", **CHUNKED) for kind in kinds]
    for kind, result in zip(kinds * 2, run_all(runs, tmp_path), strict=True):
        assert result.error is None
        check_operated(result)
        check(result.outputs, reference("unfused_qwen2" if kind == "stacked" else kind, folders[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_with_a_cache_that_the_other_variant_warmed(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = Run(str(folders[kind]), COMPILED)
    surgery = [operated(folders[kind], tmp_path, name, **COMPILED) for name in ("cold", "warm")]
    runs = [plain, surgery[0], plain, surgery[1]]
    for run, result in zip(runs, run_all(runs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache")), strict=True):
        assert result.error is None
        if run.surgery is not None:
            check_operated(result)
        check(result.outputs, reference(kind, folders[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_tensor_parallel(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = operated(folders[kind], tmp_path, "tp2", tensor_parallel_size=2)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    [result] = run_all([run], tmp_path, **env)
    assert result.error is None
    check_operated(result, ranks=2)
    names = {mutant["name"] for site in result.receipts[0]["report"]["sites"] for mutant in site["proof"]["mutants"]}
    assert any("twice" in name for name in names) and any("not reduced" in name for name in names)
    check(result.outputs, reference(kind, folders[kind]))
