"""``bench --engine``: two engines' steps compared, and what is said where there is nothing to compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine.make_checkpoint import make
from engine_examples import environment

SIZES = ("--batch", "1", "--batch", "3", "--tokens", "1", "--tokens", "16")
FLAGS = ("--engine", "--eager", "--dtype", "float32", "--no-progress", *SIZES)


def bench(folder: Path | str, *flags: str, exit_code: int, tmp: Path) -> subprocess.CompletedProcess[str]:
    main = "from moe_surgery.cli import main; main()"
    command = [sys.executable, "-c", main, "bench", str(folder), *FLAGS, *flags]
    result = subprocess.run(command, env=environment(tmp), capture_output=True, text=True, check=False)
    assert result.returncode == exit_code, (result.stdout, result.stderr)
    return result


def renamed(folder: Path, architecture: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return folder


@pytest.mark.slow
def test_both_engines_are_timed(tmp_path: Path) -> None:
    folder = tmp_path / "talker"
    make("naive_talker", folder)
    result = bench(folder, "--pack", "qwen3-omni", "--format", "json", exit_code=0, tmp=tmp_path)
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    assert [site["outcome"] for site in found["sites"]] == ["replaced"] * 3
    assert {site["rule"] for site in found["sites"]} == {"qwen3-omni/talker"}
    assert found["no_step"] == [] and found["model"] == str(folder)
    decode, prefill = found["steps"]
    assert (decode["what"], prefill["what"]) == ("decode step", "prefill")
    samples = [*decode["samples"], *prefill["samples"]]
    assert [(sample["tokens"], sample["sequences"]) for sample in samples] == [(1, 1), (1, 3), (16, 1)]
    for sample in samples:
        assert sample["old"] > 0 and sample["new"] > 0 and sample["calls"] >= 5
        assert sample["ratio"] in (None, pytest.approx(sample["old"] / sample["new"]))


@pytest.mark.slow
def test_a_model_that_is_fused_already_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    make("unfused_qwen2", folder)
    result = bench(renamed(folder, "Qwen2MoeForCausalLM"), exit_code=0, tmp=tmp_path)
    assert "already fused" in result.stdout
    assert "no step: nothing was replaced in the engine" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("0 replaced, 3 kept, 0 missed, 0 refused")


@pytest.mark.slow
def test_a_model_that_cant_be_served(tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    make("unfused_qwen2", folder)
    result = bench(renamed(folder, "NoSuchForCausalLM"), exit_code=14, tmp=tmp_path)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: vLLM ") and f"can't serve {folder}: " in line and "NoSuchForCausalLM" in line


@pytest.mark.slow
def test_surgery_that_fails_ends_with_its_own_code(tmp_path: Path) -> None:
    folder, pack = tmp_path / "talker", tmp_path / "many.toml"
    make("naive_talker", folder)
    rule = '[[rule]]\nname = "all"\nfind.path = "**"\nexpect.count = 99\n'
    pack.write_text(f'[pack]\nname = "many"\nversion = "1"\n{rule}')
    result = bench(folder, "--pack", str(pack), exit_code=11, tmp=tmp_path)
    [line] = result.stderr.splitlines()
    assert "many/all expects 99 sites and matches 3" in line


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (".", ("--only", "a.*"), "--only: not with --engine"),
        (".", ("--device", "cuda"), "--device: not with --engine"),
        (".", ("--seed", "1"), "--margin or --seed: not with --engine"),
        (".", ("--pack", "nonsense"), 'no pack is named "nonsense"'),
        ("plan.json", (), "--engine takes a model"),
        ("./nowhere", (), "./nowhere: no such directory"),
    ],
)
def test_what_an_engine_cant_be_asked(model: str, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = bench(model, *flags, exit_code=2, tmp=tmp_path)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert message in line
