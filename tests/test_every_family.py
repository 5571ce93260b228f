"""Every family, in every setting: the whole model computes the same after ``apply``, whatever became of its blocks.

``outcomes.toml`` says what must become of them, so that a family lost, or a reason that changes, is seen.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_surgery.packs.registry import load_packs
from moe_surgery.report.rows import rows
from moe_surgery.testing.coverage import UNSEEN
from moe_surgery.testing.families import DEFAULT, families
from moe_surgery.testing.trial import attempt_family

PACKS = load_packs()
LEFT: Mapping[str, list[Mapping[str, Any]]] = tomllib.loads(
    Path(__file__).with_name("outcomes.toml").read_text(encoding="utf-8")
)
# A family's default with several weights; a setting with one, not the same for all: it differs in what is read.
CASES = [
    pytest.param(name, setting, seed, marks=() if setting == DEFAULT and seed == 0 else pytest.mark.slow)
    for name, family in families().items()
    for number, setting in enumerate((DEFAULT, *family.settings))
    for seed in (range(3) if setting == DEFAULT else (number % 2,))
]
COMPILED = ["qwen2_moe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("name, setting, seed", CASES)
def test_the_model_computes_the_same_and_its_blocks_end_as_they_must(name: str, setting: str, seed: int) -> None:
    trial = attempt_family(families()[name], setting, seed, packs=PACKS)
    assert trial.wrong is None
    assert trial.report is not None
    ends = [(row.kind, row.outcome, row.reason) for row in rows(trial.report)] or [("", "missed", UNSEEN)]
    left = [end for end in ends if end[1] != "replaced"]
    said = [entry for entry in LEFT.get(name, ()) if setting in entry.get("settings", (setting,))]
    for kind, outcome, reason in left:
        fits = [entry for entry in said if entry["block"] == kind and entry["because"] in reason]
        assert fits, f"{kind} should be replaced; it is {outcome}: {reason}"
    for entry in said:
        fits = [end for end in left if end[0] == entry["block"] and entry["because"] in end[2]]
        assert fits, f"outcomes.toml says that {entry['block']} is left because {entry['because']!r}; it isn't"
    if not said:
        assert trial.report.replaced


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_it_computes_the_same_under_torch_compile(name: str) -> None:
    trial = attempt_family(families()[name], DEFAULT, packs=PACKS, compile=True)
    assert trial.wrong is None
    assert trial.report is not None and trial.report.replaced


def test_every_entry_of_the_outcomes_is_about_a_family_and_its_settings() -> None:
    for name, entries in LEFT.items():
        for entry in entries:
            assert set(entry) <= {"block", "because", "settings"} and entry["because"]
            assert set(entry.get("settings", ())) <= {DEFAULT, *families()[name].settings}


def test_the_page_of_coverage_says_the_same() -> None:
    """docs/coverage.md is what ``packs test`` found; here it is held against what the tests above hold to be so."""
    page = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines() if "|" in line]
    rows_ = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert {row["family"] for row in rows_} == set(families())
    left = [row for row in rows_ if row["outcome"] != "replaced"]
    entries = [(name, entry) for name, said in LEFT.items() for entry in said]
    for row in left:
        fits = [e for name, e in entries if (name, e["block"]) == (row["family"], row["block"])]
        assert any(entry["because"] in row["why not"] for entry in fits), row
    for name, entry in entries:
        assert any((row["family"], row["block"]) == (name, entry["block"]) for row in left), name
