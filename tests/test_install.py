"""``install``: what it hooks, what it orders, and that nothing of it stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, Qwen2MoeForCausalLM

import moe_surgery
from moe_surgery.engine.orders import VARIABLE, Orders
from moe_surgery.errors import PlanError, ReceiptError, SurgeryError, UsageError
from moe_surgery.packs.file import parse_pack
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.plan import Plan
from moe_surgery.targets.base import SwappedBlock

PACK = '[pack]\nname = "p"\nversion = "1"\n[[rule]]\nname = "r"\ntarget = "reference"\nfind.path = "**.mlp"\n'


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def model(write_tiny: Callable[[str], Path]) -> Path:
    return write_tiny("float32")


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return moe_surgery.plan(model, target="reference")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    file = tmp_path / "p.toml"
    file.write_text(PACK)
    return file


def swapped(model: Path) -> bool:
    loaded = Qwen2MoeForCausalLM.from_pretrained(model)
    return isinstance(loaded.model.layers[0].mlp, SwappedBlock)


def ordered() -> Orders:
    orders = Orders.from_env()
    assert orders is not None
    return orders


def test_packs_are_for_loaded_models_and_for_engines(
    model: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with moe_surgery.install([pack], run=tmp_path / "run", prove="all", on_failure="keep") as handle:
        assert ordered() == Orders(str(tmp_path / "run"), (str(pack),), None, "all", "keep")
        assert swapped(model)
        assert [len(report.replaced) for report in handle.reports] == [2]
        (said,) = re.findall("^moe-surgery: .*", capsys.readouterr().err, re.MULTILINE)
        assert said.startswith("moe-surgery: Qwen2MoeForCausalLM: 2 replaced, 0 kept, 0 missed, 0 refused · ")
        assert said.endswith("; Qwen2MoeSparseMoeBlock → reference")
        (receipt,) = handle.receipts()
        assert (receipt.model, receipt.outcome, receipt.pid) == ("Qwen2MoeForCausalLM", "operated", os.getpid())
        handle.check()
    assert VARIABLE not in os.environ
    assert not swapped(model)


def test_every_model_of_a_class_has_its_receipt(model: Path, pack: Path, tmp_path: Path) -> None:
    with moe_surgery.install([pack], run=tmp_path / "run") as handle:
        assert swapped(model) and swapped(model)
    assert len({receipt.model for receipt in handle.receipts()}) == 2


def test_a_plan_for_loaded_models_is_not_ordered_of_engines(model: Path, plan: Plan) -> None:
    with moe_surgery.install(plan) as handle:
        assert VARIABLE not in os.environ
        assert swapped(model)
        handle.check()
    assert Plan.load(handle.run / "plan.json") == plan


def test_a_plan_for_engines_doesnt_touch_loaded_models(model: Path, plan: Plan) -> None:
    made = replace(plan, model="vllm:Qwen2MoeForCausalLM")
    before = PreTrainedModel.__dict__["from_pretrained"]
    with moe_surgery.install(made) as handle:
        assert PreTrainedModel.__dict__["from_pretrained"] is before
        orders = ordered()
        assert orders.plan is not None and Plan.load(orders.plan) == made
        assert orders.for_engines and not orders.for_loading
        assert not swapped(model)
        with pytest.raises(ReceiptError, match="no process loaded a model"):
            handle.check()
    assert VARIABLE not in os.environ


def test_packs_reach_other_processes(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pack.parent)
    packs = [load_packs(["generic"])[0], parse_pack(PACK.replace('"p"', '"here-only"').encode(), "nowhere"), "p.toml"]
    with moe_surgery.install(packs):
        code = (
            "from moe_surgery.engine.orders import Orders; from moe_surgery.packs.registry import load_packs;"
            "print([pack.name for pack in load_packs(Orders.from_env().packs)])"
        )
        answer = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert answer.stdout == "['here-only', 'p', 'generic']\n"


def test_earlier_orders_come_back_and_share_their_folder(tmp_path: Path, pack: Path, model: Path) -> None:
    with moe_surgery.install(run=tmp_path / "run"):
        outer = ordered()
        with moe_surgery.install([pack]) as inner:
            assert ordered() == replace(outer, packs=(str(pack),))
            assert swapped(model)
        assert len(inner.receipts()) == 1  # two hooks, one operation
        assert ordered() == outer
    assert VARIABLE not in os.environ


def test_orders_that_somebody_else_changed_are_left_alone(tmp_path: Path) -> None:
    handle = moe_surgery.install(run=tmp_path / "run")
    ours = os.environ[VARIABLE]
    os.environ[VARIABLE] = Orders("/else").to_env()
    with pytest.raises(SurgeryError, match="was set by somebody else since"):
        handle.remove()
    os.environ[VARIABLE] = ours
    handle.remove()
    handle.remove()
    assert VARIABLE not in os.environ


def test_hooks_are_removed_in_the_opposite_order(tmp_path: Path, plan: Plan) -> None:
    before = PreTrainedModel.__dict__["from_pretrained"]
    first = moe_surgery.install(plan, run=tmp_path / "first")
    second = moe_surgery.install(plan, run=tmp_path / "second")
    with pytest.raises(SurgeryError, match="patched by somebody else since"):
        first.remove()
    second.remove()
    first.remove()
    assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_a_failure_raises_and_leaves_a_receipt(model: Path, plan: Plan, tmp_path: Path) -> None:
    wrong = replace(plan, steps=plan.steps[:1])
    with moe_surgery.install(wrong, run=tmp_path / "run") as handle:
        with pytest.raises(PlanError, match="the plan is for other sites"):
            Qwen2MoeForCausalLM.from_pretrained(model)
        (receipt,) = handle.receipts()
        assert (receipt.outcome, receipt.exit_code, receipt.report) == ("failed", 2, None)
        with pytest.raises(SurgeryError, match="Qwen2MoeForCausalLM.*: the plan is for other sites"):
            handle.check()
    assert handle.reports == []


def test_a_failure_may_keep_the_model(
    model: Path, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(plan, steps=plan.steps[:1])
    with moe_surgery.install(wrong, run=tmp_path / "run", on_failure="keep") as handle:
        assert not swapped(model)
    assert [receipt.outcome for receipt in handle.receipts()] == ["unpatched"]
    assert "NOT operated on, it stays as it was: the plan is for other sites" in capsys.readouterr().err


def test_what_cant_be_installed_leaves_nothing_behind(tmp_path: Path, plan: Plan, model: Path) -> None:
    before = PreTrainedModel.__dict__["from_pretrained"]
    bad = tmp_path / "bad.toml"
    bad.write_text("nonsense")
    moe_surgery.install(plan, run=tmp_path / "other").remove()
    with moe_surgery.install(plan, run=tmp_path / "used"):
        swapped(model)

    other, used = tmp_path / "other", tmp_path / "used"
    cases = [([bad], None, "auto"), (["nonsense"], None, "auto"), (replace(plan, steps=()), other, "auto")]
    cases += [(None, used, "auto"), (None, None, "nonsense"), (plan, None, "folded")]
    for what, run, target in cases:
        with pytest.raises(UsageError):
            moe_surgery.install(what, run=run, target=target)
        assert PreTrainedModel.__dict__["from_pretrained"] is before
        assert VARIABLE not in os.environ


def test_a_temporary_folder_lasts_as_long_as_the_process() -> None:
    code = """
import os, moe_surgery
run = moe_surgery.install().run
assert run.is_dir()
if os.fork() == 0:
    raise SystemExit
os.wait()
assert run.is_dir()
print(run)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(answer.stdout.strip()).exists()


def test_plugins_that_engines_would_not_see_are_refused(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UsageError, match="VLLM_PLUGINS=other hides the plugin moe_surgery"):
        moe_surgery.install(run=tmp_path / "run")
    assert VARIABLE not in os.environ and not (tmp_path / "run").exists()
    with moe_surgery.install(plan):  # which is for no engine
        assert swapped(model)
    monkeypatch.setenv("VLLM_PLUGINS", "other,moe_surgery")
    moe_surgery.install(run=tmp_path / "run").remove()
