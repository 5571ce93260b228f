"""Engines that follow each other in one process, and models in one engine: each is operated on and told of apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_examples import Result, Run, run_all
from engine_reference import check, reference

TALKER, LISTS = "NaiveTalkerForCausalLM", "ListMoeForCausalLM"


def told(result: Result) -> list[tuple[str, int, str]]:
    return [(receipt["model"], receipt["load"], receipt["outcome"]) for receipt in result.receipts]


@pytest.mark.slow
def test_engines_in_turn_in_either_order(folders: dict[str, Path], tmp_path: Path) -> None:
    kinds = {TALKER: "naive_talker", LISTS: "list_moe"}
    for last, before in ((LISTS, (TALKER,)), (TALKER, (LISTS, TALKER))):
        tmp = tmp_path / last
        tmp.mkdir()
        places = tuple(str(folders[kinds[name]]) for name in before)
        [result] = run_all([Run(str(folders[kinds[last]]), {}, {"run": str(tmp / "run")}, before=places)], tmp)
        assert result.error is None
        assert told(result) == sorted(
            (name, load, "operated") for name in kinds for load in range(1, [*before, last].count(name) + 1)
        )
        check(result.outputs, reference(kinds[last], folders[kinds[last]]))


@pytest.mark.slow
def test_a_draft_model_of_its_targets_class(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tokens are the target's, and each of the two has a receipt, also where one of them was kept as it was."""
    folder = str(folders["naive_talker"])
    options: dict[str, Any] = {
        "speculative_config": {"model": folder, "num_speculative_tokens": 2, "method": "draft_model"}
    }
    both = Run(folder, options, {"run": str(tmp_path / "both")})
    kept = Run(folder, options, {"run": str(tmp_path / "kept"), "on_failure": "keep"}, fault="building")
    results = run_all([both, kept], tmp_path)
    for result, first in zip(results, ("operated", "unpatched"), strict=True):
        assert result.error is None
        assert told(result) == [(TALKER, 1, first), (TALKER, 2, "operated")]
        check(result.outputs, reference("naive_talker", folders["naive_talker"]))
