"""Engines whose shared experts are folded into vLLM's routed layer compute what transformers computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.make_checkpoint import CONFIGS, make
from engine_examples import Result, Run, run_all
from engine_reference import check, reference
from folded_blocks import SPEC

from moe_surgery.engine.timing.graphs import own_graphs
from moe_surgery.read.reading import Reading
from moe_surgery.weights.layout import Layout, Piece

COMPILED = {"enforce_eager": False}


def folded(folder: Path, tmp: Path, name: str, **options: Any) -> Run:
    return Run(str(folder), options, {"run": str(tmp / name), "prove": "all", "target": "folded"})


def check_folded(result: Result, ranks: int = 1) -> None:
    assert result.error is None
    assert [receipt["rank"] for receipt in result.receipts] == list(range(ranks))
    for receipt in result.receipts:
        assert receipt["outcome"] == "operated" and receipt["ledger"] is not None
        sites = receipt["report"]["sites"]
        assert [(site["outcome"], site["target"]) for site in sites] == [("replaced", "folded")] * len(sites) != []
        assert all(site["proof"]["passed"] and site["proof"]["margin"] > 5 for site in sites)


@pytest.mark.slow
def test_eager(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = [folded(folders[kind], tmp_path, kind) for kind in CONFIGS]
    for kind, result in zip(CONFIGS, run_all(runs, tmp_path), strict=True):
        check_folded(result)
        check(result.outputs, reference(kind, folders[kind]))


@pytest.mark.slow
def test_a_width_that_cannot_be_cut_and_a_saved_plan(folders: dict[str, Path], tmp_path: Path) -> None:
    """The plan says why a block isn't folded, and takes the shared-fused layer; a folded plan is carried out again."""
    odd = tmp_path / "odd"
    make("unfused_qwen2", odd, width=96)  # beside a shared expert of 64
    first = folded(folders["list_moe"], tmp_path, "first")
    saved = str(tmp_path / "first" / "ListMoeForCausalLM-plan.json")
    again = Run(str(folders["list_moe"]), {}, {"run": str(tmp_path / "again"), "plan": saved})
    kept, before, after = run_all([folded(odd, tmp_path, "kept"), first, again], tmp_path)
    assert kept.error is None
    check(kept.outputs, reference("unfused_qwen2", odd))
    for site in kept.receipts[0]["report"]["sites"]:
        assert (site["outcome"], site["target"]) == ("replaced", "vllm") and site["proof"] is not None
        assert "not folded: shared width 64 is not a multiple of the expert width 96" in site["reason"]
    check_folded(before)
    assert after.error is None
    assert after.receipts[0]["fingerprint"] == before.receipts[0]["fingerprint"]
    assert {site["target"] for site in after.receipts[0]["report"]["sites"]} == {"folded"}


def test_what_is_written_to_copied_weights_in_place_is_used() -> None:
    from moe_surgery.engine.model.folded_router import FoldedLogits

    router, gate = torch.nn.Linear(64, 8), torch.nn.Linear(64, 1, bias=False)
    layout = Layout(Piece("router.weight"), (), shared_gate=Piece("gate.weight"), router_bias=Piece("router.bias"))
    logits = FoldedLogits(torch.nn.ModuleDict({"router": router, "gate": gate}), Reading(SPEC, layout, "", ()))
    x = torch.randn(3, 64)
    for _ in range(2):
        torch.testing.assert_close(logits(x), torch.cat([router(x), gate(x)], dim=-1))
        for copied in (router.weight, router.bias, gate.weight):
            copied.data.copy_(torch.randn_like(copied))


def test_copied_weights_of_another_dtype_take_nothing() -> None:
    from moe_surgery.engine.model.folded_router import FoldedLogits

    router, gate = (torch.nn.Linear(64, rows, bias=False, dtype=torch.bfloat16) for rows in (8, 1))
    layout = Layout(Piece("router.weight"), (), shared_gate=Piece("gate.weight"))
    spec = replace(SPEC, router=replace(SPEC.router, logits_dtype="float32"))
    FoldedLogits(torch.nn.ModuleDict({"router": router, "gate": gate}), Reading(spec, layout, "", ()))
    for copied, rows in ((router.weight, 8), (gate.weight, 1)):
        with pytest.raises(RuntimeError, match="size"):
            copied.data.copy_(torch.randn(rows, 64))


@pytest.mark.slow
def test_compiled_beside_the_other_target(folders: dict[str, Path], tmp_path: Path) -> None:
    """The graphs of the shared-fused layer are in the cache when the folded one is compiled."""
    kind = "naive_talker"
    other = Run(str(folders[kind]), COMPILED, {"run": str(tmp_path / "other")})
    runs = [other, folded(folders[kind], tmp_path, "folded", **COMPILED)]
    for result in run_all(runs, tmp_path, VLLM_CACHE_ROOT=own_graphs(tmp_path / "cache")):
        assert result.error is None
        check(result.outputs, reference(kind, folders[kind]))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "forked"), [("naive_talker", False), ("list_moe_whole", True)])
def test_tensor_parallel(kind: str, forked: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    run = folded(folders[kind], tmp_path, "tp2", tensor_parallel_size=2)
    [result] = run_all([run], tmp_path, forked, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    check_folded(result, ranks=2)
    check(result.outputs, reference(kind, folders[kind]))
