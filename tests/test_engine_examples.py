"""The example vLLM models compute what transformers computes from the same checkpoint, before anybody operates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.make_checkpoint import CONFIGS, EXPERTS, make
from engine_examples import Run, generate, plugin_path
from engine_reference import check, reference, tensors
from safetensors.torch import load_file, save_file


def without_shared_expert(folder: Path, layer: int) -> Path:
    """A copy in which that layer's shared expert adds nothing."""
    copy = Path(shutil.copytree(folder, folder.with_name("zeroed")))
    (name,) = (n for n in tensors(folder) if f".{layer}.mlp.shared_expert" in n and n.endswith("down_proj.weight"))
    file = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    shard = load_file(file)
    save_file({**shard, name: torch.zeros_like(shard[name])}, file, metadata={"format": "pt"})
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(kind, folder)
    folders = [folder, without_shared_expert(folder, layer=1)]
    if kind == "unfused_qwen2":
        folders.append(tmp_path / "fused")
        make(kind, folders[-1], fused=True)
    whole, zeroed, *fused = generate([Run(str(each)) for each in folders], tmp_path)
    assert all(len(set(output.tokens)) > 4 for output in whole)
    check(whole, reference(kind, folder))
    check(zeroed, reference(kind, folders[1]))
    assert all(a.tokens != b.tokens for a, b in zip(whole, zeroed, strict=True))
    assert all(outputs == whole for outputs in fused)


def test_children_see_the_entry_points(tmp_path: Path) -> None:
    code = """
from importlib.metadata import entry_points
for entry in entry_points(group="vllm.general_plugins"):
    print(entry.name, entry.load().__module__)
"""
    path = plugin_path(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(line.split() for line in child.stdout.splitlines())
    names = {"naive_talker", "unfused_moe", "list_moe"}
    assert {name: found.get(name) for name in names} == {name: name for name in names}


def test_fused_checkpoint_has_the_same_values(tmp_path: Path) -> None:
    make("unfused_qwen2", tmp_path / "apart", layers=1)
    make("unfused_qwen2", tmp_path / "fused", layers=1, fused=True)
    apart, fused = tensors(tmp_path / "apart"), tensors(tmp_path / "fused")
    experts = "model.layers.0.mlp.experts"
    down = [apart[f"{experts}.{e}.down_proj.weight"] for e in range(EXPERTS)]
    gate_up = [
        torch.cat([apart[f"{experts}.{e}.gate_proj.weight"], apart[f"{experts}.{e}.up_proj.weight"]])
        for e in range(EXPERTS)
    ]
    assert torch.equal(fused.pop(f"{experts}.down_proj"), torch.stack(down))
    assert torch.equal(fused.pop(f"{experts}.gate_up_proj"), torch.stack(gate_up))
    assert all(torch.equal(tensor, apart[name]) for name, tensor in fused.items())


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        make("list_moe", tmp_path / name, seed=seed, layers=1)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in a)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no fused form"):
        make("list_moe", tmp_path / "model", fused=True)
    with pytest.raises(ValueError, match="'llama' is none of"):
        make("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="at least one layer"):
        make("list_moe", tmp_path / "model", layers=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        make("list_moe", tmp_path)
