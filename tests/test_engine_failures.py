"""Whatever fails, the engine doesn't start serving: one clear error, its exit code, and a receipt that tells of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine.make_checkpoint import make
from engine_examples import Run, run_all
from engine_reference import check, reference
from safetensors.torch import load_file, save_file

from moe_surgery.planning.plan import Plan

EXPERT = "model.layers.1.mlp.experts.3"
Damage = Callable[[dict[str, torch.Tensor]], None]


def rewrite(folder: Path, tensor: str, damage: Damage) -> None:
    """Change the shard of a checkpoint that holds ``tensor``; the index goes on saying what it said."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][tensor]
    shard = load_file(file)
    damage(shard)
    save_file(shard, file, metadata={"format": "pt"})


def missing(folder: Path) -> None:
    rewrite(folder, f"{EXPERT}.up_proj.weight", lambda shard: shard.pop(f"{EXPERT}.up_proj.weight"))


def doubled(folder: Path) -> None:
    """In the first shard too, where the layers' tensors aren't."""
    name = f"{EXPERT}.up_proj.weight"
    rewrite(folder, "lm_head.weight", lambda shard: shard.update({name: torch.ones(32, 128)}))


def one_more(folder: Path) -> None:
    name = "model.layers.1.mlp.experts.9.up_proj.weight"
    rewrite(folder, f"{EXPERT}.up_proj.weight", lambda shard: shard.update({name: torch.ones(32, 128)}))


def another_shape(folder: Path) -> None:
    name = f"{EXPERT}.down_proj.weight"
    rewrite(folder, name, lambda shard: shard.update({name: shard[name][:, :16].contiguous()}))


def not_finite(folder: Path) -> None:
    rewrite(folder, f"{EXPERT}.up_proj.weight", lambda shard: shard[f"{EXPERT}.up_proj.weight"].fill_(torch.nan))


def truncated(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


@dataclass(frozen=True)
class Case:
    """What goes wrong, and what must be said of it: words of the message, and the exit code."""

    name: str
    words: tuple[str, ...]
    exit_code: int
    damage: Callable[[Path], None] | None = None
    fault: str | None = None


CASES = [
    Case("reading", ("reading broke",), 1, fault="reading"),
    Case("building", ("building broke",), 1, fault="building"),
    Case("loading", ("loading broke",), 1, fault="loading"),
    Case("proving", ("proving broke",), 1, fault="proving"),
    Case("wrong-build", ("model.layers.0.mlp", "not what"), 12, fault="shared expert doubled"),
    Case("stale-layer", ("model.layers.0.mlp.experts",), 1, fault="a stale layer"),
    Case("truncated", ("SafetensorError",), 1, truncated),
    Case("missing", ("model.layers.1.mlp.experts", "w13", "expert 3"), 13, missing),
    Case("doubled", (f"{EXPERT}.up_proj.weight", "twice"), 13, doubled),
    Case("one-more", ("model.layers.1.mlp.experts.9.up_proj.weight",), 13, one_more),
    # vLLM itself loads as much as there is, and says nothing.
    Case("another-shape", ("w2_weight: 2048 of 32768 elements missing", "expert 3"), 13, another_shape),
    Case("not-finite", ("model.layers.1.mlp.experts", "NaN", "expert 3"), 13, not_finite),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "naive_talker"
    make("naive_talker", folder)
    return folder


@pytest.mark.slow
def test_every_failure_ends_before_serving(whole: Path, tmp_path: Path) -> None:
    runs = []
    for case in CASES:
        folder = whole
        if case.damage is not None:
            folder = Path(shutil.copytree(whole, tmp_path / case.name))
            case.damage(folder)
        surgery = {"run": str(tmp_path / f"{case.name}-run"), "prove": "all"}
        runs.append(Run(str(folder), {}, surgery, case.fault))
    found = {}
    for case, result in zip(CASES, run_all(runs, tmp_path), strict=True):
        assert result.outputs == [] and result.error is not None, case.name
        [receipt] = result.receipts
        found[case.name] = receipt["error"], receipt["exit_code"]
        assert receipt["outcome"] == "failed", case.name
        assert receipt["error"].count("\n") == 0, receipt["error"]
        assert all(word in receipt["error"] for word in case.words), (case.name, receipt["error"])
    assert {case.name: found[case.name][1] for case in CASES} == {case.name: case.exit_code for case in CASES}


@pytest.mark.slow
def test_a_failure_that_is_kept_serves_the_model_as_it_was(whole: Path, tmp_path: Path) -> None:
    faults = [case for case in CASES if case.fault is not None]
    runs = [
        Run(str(whole), {}, {"run": str(tmp_path / case.name), "prove": "all", "on_failure": "keep"}, case.fault)
        for case in faults
    ]
    logits = reference("naive_talker", whole)
    for case, result in zip(faults, run_all(runs, tmp_path), strict=True):
        assert result.error is None, case.name
        [receipt] = result.receipts
        assert receipt["outcome"] == "unpatched" and receipt["exit_code"] == 0, case.name
        assert all(word in receipt["error"] for word in case.words), (case.name, receipt["error"])
        check(result.outputs, logits)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("the engine starts with the model as it was") == len(faults)


@pytest.mark.slow
def test_plans_hold_only_for_what_they_were_made_of(whole: Path, tmp_path: Path) -> None:
    """A plan that a run wrote is carried out as it is; on another model, or another number of layers, it is stale."""
    made = run_all([Run(str(whole), {}, {"run": str(tmp_path / "first")})], tmp_path)
    assert made[0].error is None
    file = tmp_path / "first" / "NaiveTalkerForCausalLM-plan.json"
    plan = Plan.load(file)
    make("naive_talker", tmp_path / "four", layers=4)
    make("unfused_qwen2", tmp_path / "other")
    runs = [
        Run(str(folder), {}, {"run": str(tmp_path / f"run{number}"), "plan": str(file)})
        for number, folder in enumerate((whole, tmp_path / "four", tmp_path / "other"))
    ]
    same, stale, other = run_all(runs, tmp_path)
    assert same.error is None and same.receipts[0]["fingerprint"] == plan.fingerprint
    assert same.outputs == made[0].outputs
    assert stale.receipts[0]["exit_code"] == 2
    error = "the plan was made for another checkpoint than vllm:NaiveTalkerForCausalLM: it differs in config.json"
    assert error in stale.receipts[0]["error"]
    assert other.receipts[0]["exit_code"] == 2
    assert "the plan is for vllm:NaiveTalkerForCausalLM" in other.receipts[0]["error"]
