"""``packs test``: trials that find what is wrong, the choice of what to try, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import moe_surgery
from moe_surgery import verbs
from moe_surgery.cli.app import app
from moe_surgery.errors import UsageError
from moe_surgery.packs.registry import load_packs
from moe_surgery.report.report import Report
from moe_surgery.targets.reference_target import ReferenceTarget
from moe_surgery.testing import coverage, table
from moe_surgery.testing.coverage import Coverage, Line, Tried, choose
from moe_surgery.testing.families import build, families, outputs
from moe_surgery.testing.published import EXPERTS, FORMS, build_form
from moe_surgery.testing.trial import Trial, attempt, attempt_family, distance

NARROW = """
[pack]
name = "narrow"
version = "1"
[[rule]]
name = "qwen"
config = "."
model_type = "qwen2_moe"
find.path = "**.mlp"
read.top_k = {top_k}
"""


def call(*arguments: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["packs", "test", "--no-progress", *arguments])
    assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
    return result


def data(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    return json.loads(call(*arguments, "--format", "json", exit_code=exit_code).stdout)


def test_a_family_is_tried_in_every_setting_and_proven() -> None:
    found = data("--family", "qwen2_moe", "--setting", "all")
    assert found["schema"] == "moe-surgery/coverage/1" and found["exit"] == 0
    assert [model["setting"] for model in found["models"]] == ["default", "top1", "top4", "gelu", "raw"]
    for model in found["models"]:
        (block,) = model["blocks"]
        assert model["right"] and model["restored"] and 0 < model["moved"] < 1e-4
        assert (block["outcome"], block["paths"]) == ("replaced", ["model.layers.{0,1}.mlp"])
        assert block["margin"] > 5 and block["reason"] is None
    specs = [model["blocks"][0]["spec"] for model in found["models"]]
    assert specs[1].startswith("softmax top-1 of 8 renormalised") and "gelu" in specs[3]
    assert specs[4].startswith("softmax top-2 of 8 ·")


def test_the_text_groups_settings_that_end_alike_and_the_page_says_how_it_was_made(tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    arguments = ("--family", "qwen2_moe", "--setting", "default", "--setting", "top1", "--markdown", str(page))
    lines = call(*arguments).stdout.splitlines()
    assert lines[1].startswith("~ qwen2_moe  Qwen2MoeSparseMoeBlock  margin ") and lines[1].endswith("×  all 2")
    assert lines[2].strip().startswith("softmax top-2 of 8 renormalised")
    assert lines[-1].startswith("1 of 1 family replaced with proof · 2 of 2 models right · ")
    text = page.read_text(encoding="utf-8")
    assert table.COMMAND in text
    (row,) = [line for line in text.splitlines() if line.startswith("| qwen2_moe ")]
    assert [cell.strip() for cell in row.split("|")][4:6] == ["replaced", "all 2"]
    assert " s\n" not in text


def test_the_page_tells_what_was_seen_on_a_gpu_too(tmp_path: Path) -> None:
    page, seen = tmp_path / "coverage.md", tmp_path / "h100-families.json"
    row = {"family": "qwen2_moe", "reason": None, "moved": 0.0}
    rows = [{**row, "dtype": "bfloat16", "outcome": "refused"}, {**row, "dtype": "float32", "outcome": "replaced"}]
    head = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "versions": {"torch": "2.11.0", "transformers": "5.17.0"}}
    seen.write_text(json.dumps({**head, "rows": rows}))
    call("--family", "qwen2_moe", "--markdown", str(page), "--cuda", str(seen))
    text = page.read_text(encoding="utf-8")
    assert "0 of 64 families replaced on CUDA in bfloat16, 1 of 64 in float32, with proof (NVIDIA H100" in text
    assert "torch 2.11.0 · transformers 5.17.0" in text
    assert "| refused in bfloat16, replaced in float32 |" in text
    seen.write_text('{"rows": [{}]}')
    assert "is no result of benchmarks/families.py" in call("--cuda", str(seen), exit_code=2).stderr


def test_the_page_tells_what_was_seen_in_bfloat16_and_with_many_experts_too(tmp_path: Path) -> None:
    page, seen = tmp_path / "coverage.md", tmp_path / "published-families.json"
    row = {"family": "qwen2_moe", "reason": None}
    seen.write_text(json.dumps({"rows": [{**row, "form": "bfloat16", "outcome": "refused"}]}))
    call("--family", "qwen2_moe", "--markdown", str(page), "--published", str(seen))
    text = page.read_text(encoding="utf-8")
    assert "replaced with proof: 0 in bfloat16, 0 with 256 experts" in text
    assert "| in bfloat16 | with 256 experts |" in text and "| refused | not tried |" in text
    seen.write_text('{"rows": [{}]}')
    assert "is no result of benchmarks/published.py" in call("--published", str(seen), exit_code=2).stderr


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_families_are_built_as_they_are_published_otherwise(name: str) -> None:
    for form in FORMS:
        model, inputs = build_form(families()[name], form)
        found = outputs(model, inputs)
        assert found.isfinite().all()
        [*_, step] = moe_surgery.apply(model, target="reference").steps
        assert step.outcome == "replaced" and step.spec is not None, step.reason
        assert step.spec.experts.num_experts == (EXPERTS if form == "many" else 8)
        assert found.dtype == (torch.bfloat16 if form == "bfloat16" else torch.float32)


def test_what_is_not_replaced_says_why_and_ends_with_11_under_strict() -> None:
    lines = call("--family", "vitpose_backbone").stdout.splitlines()
    assert lines[1] == "? vitpose_backbone  VitPoseBackboneMoeMLP" and lines[2].startswith("    its forward takes ")
    assert call("--family", "vitpose_backbone", "--strict", exit_code=11)


def test_only_the_families_that_a_pack_is_about_are_tried(tmp_path: Path) -> None:
    file = tmp_path / "narrow.toml"
    file.write_text(NARROW.format(top_k=2))
    found = data(str(file))
    assert [model["family"] for model in found["models"]] == ["qwen2_moe"]
    assert found["models"][0]["blocks"][0]["rule"] == "narrow/qwen"
    file.write_text(NARROW.format(top_k=3))
    (block,) = data(str(file))["models"][0]["blocks"]
    assert block["outcome"] == "missed" and "wanted 3, measured 2" in block["reason"]


def test_names_that_are_not_there_are_errors_with_what_there_is(tmp_path: Path) -> None:
    assert "no family is called 'qwen9'" in call("--family", "qwen9", exit_code=2).stderr
    assert "no family has a setting 'top9'; there are 2-norm, all, " in call("--setting", "top9", exit_code=2).stderr
    assert "no pack is named" in call("nonsense", exit_code=2).stderr
    file = tmp_path / "narrow.toml"
    file.write_text(NARROW.format(top_k=2).replace("qwen2_moe", "unheard_of"))
    assert "PackTest tests a pack with a model of your own" in call(str(file), exit_code=2).stderr


def test_families_without_a_wanted_setting_are_left_out() -> None:
    generic = load_packs(["generic"])
    assert {setting for _, setting in choose(generic, (), ("clamp",))} == {"clamp"}
    assert len(choose(generic, (), ("all",))) == sum(1 + len(one.settings) for one in families().values())
    with pytest.raises(UsageError):
        choose(generic, ("qwen2_moe", "nope"), ("all",))


class Halved(ReferenceTarget):
    """A target whose blocks return half of what they should."""

    def build(self, *arguments: Any, **named: Any) -> Any:
        block = super().build(*arguments, **named)
        forward = block.forward
        block.forward = lambda *a, **k: forward(*a, **k) / 2
        return block


def test_a_wrong_target_is_rolled_back_and_ends_with_12(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Halved())
    result = call("--family", "qwen2_moe", exit_code=12)
    assert "wrong    qwen2_moe default: model.layers.0.mlp: " in result.stdout
    assert "error: 1 of 1 models are wrong, first qwen2_moe default" in result.stderr
    trial = attempt_family(families()["qwen2_moe"], "default")
    assert not trial.right and trial.restored and trial.moved == 0


def test_an_unexpected_error_is_that_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ReferenceTarget):
        def build(self, *arguments: Any, **named: Any) -> Any:
            raise IndexError("out of bounds")

    monkeypatch.setattr(verbs, "get_target", lambda name: Broken())
    result = call("--family", "qwen2_moe", "--family", "vitpose_backbone", exit_code=1)
    assert "unexpected IndexError: out of bounds" in result.stdout
    assert "1 of 2 models right" in result.stdout
    assert not attempt_family(families()["qwen2_moe"], "default").loud


def test_outputs_that_move_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where every proof passes: the comparison of whole models is a check of its own."""
    model, inputs = build("qwen2_moe")

    def drifting(model: nn.Module, inputs: Any) -> torch.Tensor:
        swapped = any("Swapped" in kind.__name__ for module in model.modules() for kind in type(module).__mro__)
        return outputs(model, inputs) * (1.001 if swapped else 1)

    trial = attempt(model, inputs, outputs=drifting, target="reference")
    assert trial.wrong == "outputs moved by 1.0e-03, more than 1e-04" and trial.exit_code == 12


def test_a_new_block_that_is_never_called_is_found() -> None:
    model, inputs = build("qwen2_moe")
    first = model.model.layers[0]
    block = first.mlp

    def around(*arguments: Any) -> Any:
        """The old block is called, whatever stands at its place."""
        held, first._modules["mlp"] = first.mlp, block
        try:
            return outputs(*arguments)
        finally:
            first._modules["mlp"] = held

    trial = attempt(model, inputs, outputs=around, target="reference")
    assert trial.wrong == "model.layers.0.mlp: replaced, but the model didn't call the new block"


def test_an_undo_that_leaves_something_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_surgery, "undo", lambda report: None)
    trial = attempt_family(families()["qwen2_moe"], "default", target="reference")
    assert trial.wrong == "undo did not leave the model as it was"


def test_the_distance_of_tensors_that_can_not_be_compared_is_infinite() -> None:
    one = torch.ones(2, 3)
    assert distance(one, one) == 0 and distance(one * 1.5, one) == pytest.approx(0.5)
    assert distance(one[:1], one) == float("inf") == distance(one / 0, one)


def test_a_model_without_any_site_is_a_miss_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_seen(*arguments: Any, **named: Any) -> Trial:
        return Trial(Report("some", "applied", (), "", {}), 0.0, True)

    monkeypatch.setattr(coverage, "attempt_family", nothing_seen)
    assert "\n    no module of the model looks like a sparse-MoE block\n" in call("--family", "mixtral").stdout
    assert call("--family", "mixtral", "--strict", exit_code=11)


def test_a_family_counts_as_replaced_only_if_all_that_was_tried_is() -> None:
    def tried(setting: str, outcome: Any, moved: float = 0.0) -> Tried:
        line = Line("mixtral", setting, "Block", ("a",), outcome, None, None, None, None, None)
        return Tried("mixtral", setting, Trial(None, moved, True), (line,))

    def replaced(*models: Tried) -> tuple[str, ...]:
        return Coverage(("generic",), models, 0.0).replaced()

    assert replaced(tried("default", "replaced"), tried("top1", "replaced")) == ("mixtral",)
    assert replaced(tried("default", "replaced"), tried("top1", "refused")) == ()
    assert replaced(tried("default", "replaced", moved=1.0)) == ()


def test_the_built_in_packs_are_short_and_each_of_their_rules_replaces_a_block() -> None:
    names = {rule.full_name for pack in load_packs() for rule in pack.rules}
    for file in (Path(__file__).parents[1] / "rules").glob("*.toml"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 40, file
    found = data("--family", "qwen3_omni_moe", "--family", "qwen3_omni_moe#talker", "--family", "qwen3_moe")
    used = {block["rule"] for model in found["models"] for block in model["blocks"]}
    assert used == names
    assert call("qwen3-omni").stdout.count("\n~ ") == 2
