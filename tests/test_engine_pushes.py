"""Weights that are pushed into an operated engine are refused before one is written, whatever way they come."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.make_checkpoint import make
from engine_examples import PUSHES, Run, run_all

TARGETS = {"naive_talker": ("vllm", "folded"), "list_moe": ("vllm",)}


@pytest.mark.slow
def test_no_push_changes_an_operated_model(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for kind, targets in TARGETS.items():
        other = tmp_path / kind
        make(kind, other, seed=1)
        for target in targets:
            run = str(tmp_path / f"{kind}-{target}")
            runs.append(Run(str(folders[kind]), {}, {"run": run, "target": target}, push=str(other)))
    for result in run_all(runs, tmp_path):
        assert result.error is None
        before, after = result.outputs[:2], result.outputs[2:]
        assert after == before  # to the last bit
        assert result.pushes.keys() == PUSHES.keys()
        for way, told in result.pushes.items():
            assert "start the engine again" in told and "mlp" in told and "\n" not in told, (way, told)
