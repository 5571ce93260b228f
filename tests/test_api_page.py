"""The library's page: every public name has its parts in its docstring, and their examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import moe_surgery
import moe_surgery.testing
from moe_surgery import SurgeryError

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
PUBLIC = {
    **{f"moe_surgery.{name}": getattr(moe_surgery, name) for name in moe_surgery.__all__ if name != "__version__"},
    **{f"moe_surgery.testing.{name}": getattr(moe_surgery.testing, name) for name in moe_surgery.testing.__all__},
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
EXAMPLES = {
    name: value
    for name, value in PUBLIC.items()
    if not (inspect.isclass(value) and (SurgeryError in value.__mro__[1:] or value is moe_surgery.testing.PackTest))
}


def test_every_public_name_is_on_the_page() -> None:
    assert sorted(re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)) == sorted(PUBLIC)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_and_result_is_told(name: str) -> None:
    function, told = FUNCTIONS[name], inspect.getdoc(FUNCTIONS[name]) or ""
    signature = inspect.signature(function)
    section = told.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    \*{0,2}(\w+):", section, re.MULTILINE) == list(signature.parameters)
    assert ("Returns:\n" in told) == (signature.return_annotation != "None")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = moe_surgery.testing.build("qwen2_moe")
    model.save_pretrained("saved")
    names: dict[str, Any] = {"moe_surgery": moe_surgery, "model": model, "saved": "saved"}
    [test] = [
        test for test in doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs=names) if test.examples
    ]
    told: list[str] = []
    assert not doctest.DocTestRunner(verbose=False).run(test, out=told.append).failed, "".join(told)
