"""docs/models.md is what ``benchmarks/models.py`` says of the models in its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> list[list[str]]:
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][2:]


def test_every_model_has_a_row(models: ModuleType) -> None:
    assert list(dict.fromkeys(row[0] for row in page())) == list(models.table())
    assert len(models.table()) >= 60


@pytest.mark.parametrize(
    "name", ["mistralai/Mixtral-8x7B-v0.1", "openai/gpt-oss-20b", "google/switch-base-8", "moonshotai/Kimi-K2-Instruct"]
)
def test_rows_are_current(name: str, models: ModuleType) -> None:
    found = [[cell.strip() for cell in row] for row in models.rows(name, models.table()[name])]
    assert [row[:-1] for row in page() if row[0] == name] == found
