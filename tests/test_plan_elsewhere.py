"""Plans for another device and dtype than the checkpoint and this machine have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen2MoeForCausalLM
from typer.testing import CliRunner

import moe_surgery
from moe_surgery.cli.app import app
from moe_surgery.errors import PlanError, UsageError

Write = Callable[[str], Path]


def test_a_plan_for_cuda_is_made_without_one(write_tiny: Write, tmp_path: Path) -> None:
    here = moe_surgery.plan(write_tiny("float32"))
    made = moe_surgery.plan(write_tiny("float32"), device="cuda:1", dtype="bfloat16")
    assert (here.device, here.dtype, made.device, made.dtype) == (None, None, "cuda", "bfloat16")
    assert [(step.outcome, step.target) for step in made.steps] == [("replaced", "folded")] * 2
    assert here.costs is not None and made.costs is not None
    assert 2 * made.costs.blocks == here.costs.blocks and made.costs.free is None
    assert "on cuda in bfloat16" in made.costs.sentence() and "EPYC" not in made.costs.sentence()
    made.save(tmp_path / "plan.json")
    loaded = moe_surgery.Plan.load(tmp_path / "plan.json")
    assert loaded == made and made.fingerprint != here.fingerprint


def test_a_layer_that_is_hosted_on_cpu_only_is_refused_for_cuda(write_tiny: Write) -> None:
    made = moe_surgery.plan(write_tiny("float32"), target="vllm", device="cuda")
    assert {step.outcome for step in made.steps} == {"refused"} and "on cuda" in made.steps[0].reason


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"device": "cuda"}, r"for a model on cuda in float32, this one is on cpu in float32"),
        ({"dtype": "bfloat16"}, r"for a model on cpu in bfloat16, this one is on cpu in float32"),
    ],
)
def test_what_was_loaded_otherwise_does_not_fit(write_tiny: Write, place: dict[str, str], message: str) -> None:
    made = moe_surgery.plan(write_tiny("float32"), target="reference", **place)
    model = Qwen2MoeForCausalLM.from_pretrained(write_tiny("float32")).eval()
    with pytest.raises(PlanError, match=message):
        moe_surgery.apply(model, made)


def test_a_saved_plan_is_loaded_in_its_dtype_and_not_on_another_device(write_tiny: Write, tmp_path: Path) -> None:
    def call(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, result.output + result.stderr

    file, target = tmp_path / "plan.json", ("--target", "reference")
    assert call("plan", write_tiny("float32"), *target, "--dtype", "bfloat16", "-o", file)[0] == 0
    assert call("verify", file)[0] == 0
    assert call("verify", file, "--dtype", "float32")[0] == 2
    assert call("plan", write_tiny("float32"), *target, "--device", "cuda", "-o", file)[0] == 0
    code, text = call("verify", file)
    assert code == 2 and "made for a model on cuda, this one is on cpu" in text
    assert call("plan", write_tiny("float32"), "--device", "nowhere")[0] == 2


def test_places_that_no_plan_can_be_for(write_tiny: Write) -> None:
    model = Qwen2MoeForCausalLM.from_pretrained(write_tiny("float32")).eval()
    with pytest.raises(UsageError, match="as it is"):
        moe_surgery.plan(model, device="cuda")
    for place in ({"device": "meta"}, {"device": 5}, {"device": "nowhere"}, {"dtype": "int8"}):
        with pytest.raises(UsageError):
            moe_surgery.plan(write_tiny("float32"), **place)
