"""Every family, in every setting: the whole model computes the same after ``apply``, whatever became of its blocks.

``outcomes.toml`` says what must become of them, so that a family lost, or a reason that changes, is seen.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_surgery.registry import load_packs
from moe_surgery.report.rows import rows
from moe_surgery.testing.coverage import UNSEEN
from moe_surgery.testing.families import DEFAULT, families
from moe_surgery.testing.trial import attempt_family

PACKS = load_packs()
LEFT: Mapping[str, list[Mapping[str, Any]]] = tomllib.loads(
    Path(__file__).with_name("outcomes.toml").read_text(encoding="utf-8")
)
CASES = [
    pytest.param(name, setting, seed, marks=() if setting == DEFAULT and seed == 0 else pytest.mark.slow)
    for name, family in families().items()
    for setting in (DEFAULT, *family.settings)
    for seed in (range(3) if setting == DEFAULT else (0,))
]
COMPILED = ["qwen2_moe", "mixtral", "deepseek_v2", "granitemoeshared", "cohere2_moe"]


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
