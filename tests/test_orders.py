"""Orders as they travel to child processes, and the plugin that looks for them there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from moe_surgery.engine import plugin
from moe_surgery.engine.orders import SCHEMA, VARIABLE, Orders
from moe_surgery.errors import UsageError

HEAVY = "('torch', 'transformers', 'vllm', 'moe_surgery.engine.model.seam')"
FULL = Orders("/r", ("generic", "/p/x.toml"), "/p/plan.json", "all", "keep", "folded")


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(FULL.to_env()), **fields})


@pytest.mark.parametrize("orders", [Orders("/runs/one"), FULL, Orders("/r", ())])
def test_orders_come_back_as_they_went(orders: Orders) -> None:
    assert Orders.from_env({VARIABLE: orders.to_env()}) == orders


def test_no_orders() -> None:
    assert Orders.from_env({}) is None


def test_orders_are_looked_for_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, FULL.to_env())
    assert Orders.from_env() == FULL


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("{", "unreadable orders"),
        ("[]", "list found"),
        ("{}", f"schema {SCHEMA} wanted, None found"),
        (changed(schema="moe-surgery/orders/2"), "orders/2 found"),
        (changed(more=1), "more found"),
        (changed(run="relative"), "run can't be 'relative'"),
        (changed(run=None), "run can't be None"),
        (changed(packs="generic"), "packs can't be 'generic'"),
        (changed(packs=[1]), "packs can't be"),
        (changed(plan="plan.json"), "plan can't be"),
        (changed(prove="none"), "prove can't be 'none'"),
        (changed(prove=["all"]), "prove can't be"),
        (changed(on_failure="ignore"), "on_failure can't be 'ignore'"),
        (changed(target="nonsense"), "target can't be 'nonsense'"),
    ],
)
def test_orders_that_cant_be_read_are_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Orders.from_env({VARIABLE: text})
    assert str(caught.value).startswith(VARIABLE)


def test_a_plan_is_for_engines_or_for_loading(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    orders = Orders("/r", plan=str(file))
    for model, engines in (("vllm:Qwen2MoeForCausalLM", True), ("some/model", False)):
        file.write_text(json.dumps({"model": model}))
        assert (orders.for_engines, orders.for_loading) == (engines, not engines)
    assert Orders("/r").for_engines and Orders("/r").for_loading
    for text in ("", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"plan\.json: not a plan"):
            orders.plan_is_for_engines()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**{name: value for name, value in os.environ.items() if name != VARIABLE}, **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


ACTIVATE = f"""
import sys
from moe_surgery.engine.plugin import activate
activate(); activate()
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_without_orders_the_plugin_does_nothing() -> None:
    assert run(ACTIVATE).stdout == "[]\n"


def test_a_plan_for_loaded_models_is_nothing_to_engines(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"model": "some/model"}')
    assert run(ACTIVATE, **{VARIABLE: Orders(str(tmp_path), plan=str(file)).to_env()}).stdout == "[]\n"


def test_orders_that_cant_be_read_end_the_process() -> None:
    result = run(ACTIVATE, **{VARIABLE: "nonsense"})
    assert result.returncode == 1
    assert f"UsageError: {VARIABLE}: unreadable orders" in result.stderr


def test_the_installed_package_has_the_entry_point() -> None:
    """``make setup`` installs again if this fails: pyproject.toml changed since."""
    (point,) = (point for point in metadata.entry_points(group=plugin.GROUP) if point.name == plugin.NAME)
    assert point.load() is plugin.activate
