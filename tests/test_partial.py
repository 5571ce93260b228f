"""Models on the meta device whose parts are loaded one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_surgery.errors import ModelError
from moe_surgery.models.opening import open_meta
from moe_surgery.models.partial import Partial
from moe_surgery.testing.families import build

MIXTRAL = "model.layers.1.mlp"


def partial(family: str, folder: Path) -> tuple[torch.nn.Module, Partial]:
    model, _ = build(family)
    model.save_pretrained(folder)
    return model, Partial(open_meta(str(folder), dtype="float32"))


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("mixtral", MIXTRAL),  # experts are put together, and the block has another name in the checkpoint
        ("deepseek_v3", "model.layers.1.mlp"),  # with a buffer
        ("jetmoe", "model.layers.0.mlp"),
        ("gpt_oss", "model.layers.0.mlp"),  # transposed, with biases
    ],
)
def test_a_part_holds_what_the_model_holds(family: str, path: str, tmp_path: Path) -> None:
    model, weights = partial(family, tmp_path)
    with weights.loaded(path) as part:
        wanted = model.get_submodule(path).state_dict()
        assert part.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in part.state_dict().items())
    assert all(tensor.is_meta for tensor in weights.opened.module.parameters())


def test_sources_are_the_checkpoints_own_names(tmp_path: Path) -> None:
    _, weights = partial("mixtral", tmp_path)
    sources = weights.sources(MIXTRAL)
    assert len(sources) == 1 + 3 * 8
    assert all(name.startswith("model.layers.1.block_sparse_moe.") for name in sources)


def test_a_tensor_that_lies_in_another_file_is_found(tmp_path: Path) -> None:
    model, _ = build("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = Partial(open_meta(str(tmp_path), dtype="float32"))
    with weights.loaded(MIXTRAL) as part:
        assert torch.equal(part.experts.down_proj, model.get_submodule(MIXTRAL).experts.down_proj)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "gate.weight is not in the checkpoint"),
        (lambda tensors, name: tensors.update({name: tensors[name][:4]}), "gate.weight is of another shape"),
    ],
    ids=["missing", "misshapen"],
)
def test_what_the_checkpoint_lacks_is_named(change: object, message: str, tmp_path: Path) -> None:
    partial("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors, "model.layers.1.block_sparse_moe.gate.weight")  # type: ignore[operator]
    save_file(tensors, file, metadata={"format": "pt"})
    weights = Partial(open_meta(str(tmp_path), dtype="float32"))
    with pytest.raises(ModelError, match=message), weights.loaded(MIXTRAL):
        pass
    assert all(tensor.is_meta for tensor in weights.opened.module.parameters())


def test_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    partial("mixtral", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    weights = Partial(open_meta(str(tmp_path), dtype="bfloat16"))
    with weights.loaded(MIXTRAL) as part:
        assert {tensor.dtype for tensor in part.parameters()} == {torch.bfloat16}
