"""What differs between two records, from constructed values and from files that commands wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import NORM, THINKER, report, talker, thinker, verdict
from typer.testing import CliRunner

from moe_surgery.cli.app import app
from moe_surgery.engine.receipts import write
from moe_surgery.planning.plan import Plan
from moe_surgery.report.difference import Change, Record, changes
from moe_surgery.report.outcomes import Step
from moe_surgery.report.receipt import Receipt


def found(before: list[Step], after: list[Step], **speeds: Any) -> tuple[Change, ...]:
    old, new = (speeds.get(name, {}) for name in ("old", "new"))
    return changes(Record("", report(before), old), Record("", report(after), new))


def test_the_same_is_no_difference_whatever_was_measured() -> None:
    again = thinker(0, reason="other numbers", verdict=verdict(2e-3, 9.0))
    assert found([thinker(0)], [again]) == ()


def test_each_thing_that_differs_is_named_at_its_site() -> None:
    missed = thinker(0, outcome="missed", reason=NORM, verdict=None, target=None)
    assert found([thinker(0)], [missed]) == (
        Change("thinker.model.layers.0.mlp", "outcome", "replaced", "missed"),
        Change("thinker.model.layers.0.mlp", "reason", "proven", NORM),
        Change("thinker.model.layers.0.mlp", "target", "fused", "none"),
        Change("thinker.model.layers.0.mlp", "margin", "6.8×", "none"),
    )
    other = thinker(0, spec=replace(THINKER, hidden=1024))
    assert [change.what for change in found([thinker(0)], [other])] == ["spec"]
    assert [change.what for change in found([thinker(0)], [thinker(0, verdict=verdict(margin=13.7))])] == ["margin"]
    assert [change.after for change in found([thinker(0), talker(0)], [thinker(0)])] == ["absent"]


@pytest.mark.parametrize("done", ["planned", "scanned"])
def test_what_has_no_proofs_has_no_other_margins(done: Any) -> None:
    planned = report([thinker(0, verdict=None)]).but(done=done)
    proven = report([thinker(0)])
    assert changes(Record("", planned, {}), Record("", proven, {})) == ()
    assert changes(Record("", proven, {}), Record("", planned, {})) == ()


def test_a_run_with_a_wrong_layer_is_compared_with_one_without(tmp_path: Path) -> None:
    for name, outcome, code in (("wrong", "wrong", 12), ("right", "right", 0)):
        made = report([talker(0, outcome=outcome)], done="audited").to_json()
        (tmp_path / name).mkdir()
        error = "a layer is wrong" if code else None
        write(tmp_path / name, Receipt(7, 0, 1, "Model", "audited", None, None, made, error, code))
    assert "wrong → right" in call(tmp_path / "wrong", tmp_path / "right", exit_code=10)
    write(tmp_path / "wrong", Receipt(7, 0, 1, "Model", "failed", None, None, None, "out of memory", 1))
    assert "Model: out of memory" in call(tmp_path / "wrong", tmp_path / "right", exit_code=1)


def test_a_spec_that_differs_in_what_its_sentence_leaves_out_differs() -> None:
    wide = replace(THINKER, router=replace(THINKER.router, logits_dtype="float32"))
    assert found([thinker(0)], [thinker(0, spec=wide)]) == (
        Change("thinker.model.layers.0.mlp", "spec", "logits_dtype native", "logits_dtype float32"),
    )


@pytest.mark.parametrize(("spread", "differs"), [(0.1, True), (0.3, False), (None, False)])
def test_speeds_differ_only_beyond_their_spreads(spread: float | None, differs: bool) -> None:
    listed = found([thinker(0)], [thinker(0)], old={"a block": (2.0, 0.2)}, new={"a block": (1.6, spread)})
    assert [change.what for change in listed] == ["speed"] * differs


def call(*paths: Path, exit_code: int) -> str:
    result = CliRunner().invoke(app, ["diff", *map(str, paths)])
    assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
    return result.stdout + result.stderr


def test_plans_reports_and_runs_are_read_from_their_files(tmp_path: Path) -> None:
    refused = [thinker(layer, outcome="refused", reason=NORM, verdict=None) for layer in range(3)]
    for name, steps in (("a", [thinker(layer, verdict=None) for layer in range(3)]), ("b", refused)):
        Plan("org/model", "auto", tuple(steps)).save(tmp_path / f"plan-{name}.json")
        made = report(steps).to_json()
        (tmp_path / f"report-{name}.json").write_text(json.dumps(made))
        (tmp_path / f"run-{name}").mkdir()
        write(tmp_path / f"run-{name}", Receipt(7, 0, 1, "Model", "operated", "f", "l", made))
    for kind in ("plan-{}.json", "report-{}.json", "run-{}"):
        old, new = tmp_path / kind.format("a"), tmp_path / kind.format("b")
        assert call(old, old, exit_code=0).splitlines()[-1] == "no difference"
        lines = call(old, new, exit_code=10).splitlines()
        at = lines.index("thinker.model.layers.{0..2}.mlp")
        assert lines[at + 1].split() == ["outcome", "replaced", "→", "refused"]
        assert lines[-1] == "3 sites differ: 3 in outcome, 3 in reason"
    told = CliRunner().invoke(app, ["diff", str(tmp_path / "run-a"), str(tmp_path / "run-b"), "--format", "json"])
    data = json.loads(told.stdout)
    assert (data["schema"], data["exit"], len(data["changes"])) == ("moe-surgery/diff/1", 10, 6)


@pytest.mark.parametrize("text", ["[1]", "{", '{"schema": "other"}', '{"schema": "moe-surgery/run/1"}'])
def test_what_is_no_record_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    assert f"error: {file}: " in call(file, file, exit_code=2)


def test_a_file_that_is_missing_and_models_that_are_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", Receipt(7, 0, 1, "Model", "operated", "f", "l", report().to_json()))
    plan = tmp_path / "plan.json"
    assert "can't read" in call(plan, plan, exit_code=2)
    assert f"error: {tmp_path}: a folder without receipts of a run" in call(tmp_path, tmp_path, exit_code=2)
    Plan("org/model", "auto", ()).save(plan)
    assert "tell of different models" in call(plan, tmp_path / "run", exit_code=2)
