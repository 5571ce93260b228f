"""Opening models: on the meta device, with weights, and every way in which a checkpoint can be unfit."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import HANG
from qwen3_omni_config import FULL, SMALL, omni_config
from safetensors.torch import load_file, save_file

from moe_surgery.errors import ModelError, UsageError
from moe_surgery.models.checkpoint import checkpoint_headers
from moe_surgery.models.opening import load_model, open_meta

WriteTiny = Callable[[str], Path]


def config_only(directory: Path, config: object) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def index_of(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def test_meta_and_real_agree_in_every_name_shape_and_dtype(omni_dir: Path) -> None:
    meta, real = open_meta(str(omni_dir)), load_model(str(omni_dir))
    assert {p.device.type for p in meta.module.parameters()} == {"meta"}
    assert {p.device.type for p in real.module.parameters()} == {"cpu"}
    shapes = [{n: (p.shape, p.dtype) for n, p in o.module.named_parameters()} for o in (meta, real)]
    assert shapes[0] == shapes[1]
    assert {"thinker", "talker", "code2wav"} <= dict(meta.module.named_children()).keys()
    assert not meta.module.training
    assert not real.module.training
    assert meta.name == real.name == "omni"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_the_checkpoints(write_tiny: WriteTiny, dtype: str) -> None:
    for opened in (open_meta(str(write_tiny(dtype))), load_model(str(write_tiny(dtype)))):
        assert {p.dtype for p in opened.module.parameters()} == {getattr(torch, dtype)}


def test_dtype_from_the_parts_config_and_from_headers(write_tiny: WriteTiny, tmp_path: Path) -> None:
    config = omni_config(SMALL, "bfloat16")
    del config["dtype"]  # the thinker's config still says it
    opened = open_meta(config_only(tmp_path / "parts", config))
    assert {p.dtype for p in opened.module.parameters()} == {torch.bfloat16}

    source = write_tiny("bfloat16")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    model = Path(config_only(tmp_path / "headers", config))
    assert {p.dtype for p in open_meta(str(model)).module.parameters()} == {torch.float32}
    data = (source / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: 8 + struct.unpack("<Q", data[:8])[0]])
    assert {p.dtype for p in open_meta(str(model)).module.parameters()} == {torch.bfloat16}


def test_another_dtype_on_request(write_tiny: WriteTiny) -> None:
    opened = load_model(str(write_tiny("float32")), dtype="bfloat16")
    assert {p.dtype for p in opened.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["int8", "float33", "nn"])
def test_bad_dtype(write_tiny: WriteTiny, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"'{dtype}' is not a floating-point dtype"):
        load_model(str(write_tiny("float32")), dtype=dtype)


def test_a_dtype_that_needs_scales_is_told_apart(write_tiny: WriteTiny) -> None:
    with pytest.raises(UsageError, match=r"'float8_e4m3fn' is a dtype that weights are kept in with scales"):
        load_model(str(write_tiny("float32")), dtype="float8_e4m3fn")


def test_bad_device(write_tiny: WriteTiny) -> None:
    with pytest.raises(UsageError, match="'toaster' is no device of torch"):
        load_model(str(write_tiny("float32")), device="toaster")


def test_config_is_raw(tmp_path: Path) -> None:
    config = omni_config(FULL)
    opened = open_meta(config_only(tmp_path / "full", config))
    assert opened.config == config  # no default of a config class, such as pad_token_id, has come in
    text = opened.module.config.talker_config.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.norm_topk_prob) == (128, 6, True)
    assert opened.module.talker.model.layers[19].mlp.experts.gate_up_proj.shape == (128, 768, 1024)


def test_class_without_architectures_comes_from_the_model_type(write_tiny: WriteTiny, tmp_path: Path) -> None:
    config = json.loads((write_tiny("float32") / "config.json").read_text())
    del config["architectures"]
    opened = open_meta(config_only(tmp_path / "typed", config))
    assert type(opened.module).__name__ == "Qwen2MoeForCausalLM"


@pytest.mark.parametrize(
    "config, message",
    [
        ("{\n  'a': 1}", r"config\.json:2: not valid JSON"),
        ("[1, 2]", r"config\.json: a JSON object is wanted, not list"),
        ({"architectures": [3]}, r"config\.json: architectures: a list of class names is wanted, not \[3\]"),
        ({"quantization_config": "fp8"}, r"config\.json: quantization_config: an object is wanted, not 'fp8'"),
        ({"architectures": ["NoSuchForCausalLM"]}, r"config\.json: architectures: .* has no class 'NoSuchForCausalLM'"),
        ({"architectures": ["AutoConfig"]}, "has no class 'AutoConfig'"),
        ({"hidden_size": 8}, r"config\.json: neither architectures nor model_type"),
        ({"model_type": "no_such_type"}, r"model/config\.json: model_type: .* doesn't know 'no_such_type'"),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "auto_map": {"AutoModel": "its.Own"}},
            r"config\.json: auto_map: .* only with trust_remote_code",
        ),
        ({"model_type": "siglip"}, r"config\.json: architectures is missing, and model_type 'siglip'"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "dtype": "int4"}, "dtype: 'int4'"),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": "many"},
            r"model/config\.json: num_experts: a whole number is wanted, not 'many'$",
        ),
        (
            omni_config(SMALL) | {"talker_config": omni_config(SMALL)["talker_config"] | {"text_config": [1]}},
            r"model/config\.json: talker_config\.text_config: an object or null is wanted, not \[1\]$",
        ),
        (
            {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "rope_scaling": "x"},
            r"model/config\.json: rope_scaling: an object or null is wanted, not 'x'$",
        ),
        (
            {"model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "auto_map": 5},
            r"model/config\.json: auto_map: an object is wanted, not 5: TypeError",
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_attention_heads": 0},
            r"model/config\.json: num_attention_heads is 0: ZeroDivisionError",
        ),
        (
            {
                "architectures": ["Qwen2MoeForCausalLM"],
                "model_type": "qwen2_moe",
                "shared_expert_intermediate_size": -1,
            },
            r"model/config\.json: shared_expert_intermediate_size is -1: RuntimeError: .* negative dimension",
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_act": "frob"},
            r"model/config\.json: hidden_act is 'frob', which transformers has nothing for",
        ),
        (
            {"architectures": ["MyModel"], "auto_map": {"AutoModelForCausalLM": "mine.MyModel"}},
            r"config\.json: auto_map: .* only with trust_remote_code",
        ),
    ],
)
def test_unfit_config(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_meta(config_only(tmp_path / "model", config))


def test_a_model_that_memory_has_no_room_for_is_told_so(write_tiny: WriteTiny, tmp_path: Path) -> None:
    directory = shutil.copytree(write_tiny("float32"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_experts": 10**11}))
    with pytest.raises(MemoryError, match="allocate"):
        load_model(str(directory))


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        open_meta(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"config\.json: no such file; model\.gguf is a GGUF file"):
        open_meta(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "maker/base"}')
    with pytest.raises(ModelError, match=r"no such file; here is an adapter, .* that it adapts, maker/base"):
        open_meta(str(tmp_path))
    with pytest.raises(ModelError, match="a file; a model is a directory"):
        open_meta(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match="absent: no such directory"):
        open_meta(str(tmp_path / "absent"))


REMOTE_CODE = """
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

class MyConfig(Qwen2MoeConfig):
    pass

class MyModel(Qwen2MoeForCausalLM):
    config_class = MyConfig
    brought_along = True
"""


def test_remote_code_runs_only_if_trusted(
    write_tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    config = json.loads((write_tiny("float32") / "config.json").read_text())
    config |= {
        "architectures": ["MyModel"],
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    model = Path(config_only(tmp_path / "remote", config))
    (model / "mine.py").write_text(REMOTE_CODE)
    (model / "model.safetensors").write_bytes((write_tiny("float32") / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="only with trust_remote_code"):
        load_model(str(model))
    assert not (tmp_path / "cache").exists()
    assert open_meta(str(model), trust_remote_code=True).module.brought_along
    opened = load_model(str(model), trust_remote_code=True)
    stored = load_file(model / "model.safetensors")
    assert torch.equal(opened.module.lm_head.weight, stored["lm_head.weight"])
    for change in ({"architectures": ["Qwen2MoeForCausalLM"]}, {"auto_map": {"AutoModelForCausalLM": "mine.MyModel"}}):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        assert open_meta(str(model), trust_remote_code=True).module.brought_along
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2MoeForCausalLM"]}))
    assert not hasattr(open_meta(str(model)).module, "brought_along")


@pytest.mark.parametrize(
    "name, own", [("Qwen2MoEForCausalLM", True), ("Qwen2_MoeForCausalLM", True), ("Qwen2MoeFlashForCausalLM", False)]
)
def test_a_class_is_found_by_the_models_type(write_tiny: WriteTiny, tmp_path: Path, name: str, own: bool) -> None:
    config = json.loads((write_tiny("float32") / "config.json").read_text()) | {"architectures": [name]}
    config |= {"auto_map": {"AutoModelForCausalLM": "mine.MyModel"}} if own else {}
    assert type(open_meta(config_only(tmp_path / "model", config)).module).__name__ == "Qwen2MoeForCausalLM"


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = Path(config_only(tmp_path / "old", omni_config(SMALL)))
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for open_it in (open_meta, load_model):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights are never read"):
            open_it(str(model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_is_not_waited_for(write_tiny: WriteTiny, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(write_tiny("float32"), tmp_path / "model"))
    (directory / name).unlink()
    os.mkfifo(directory / name)
    code = "import sys; from moe_surgery.models.opening import load_model as load; load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=HANG)
    assert f"ModelError: {directory / name}: neither a file nor a link to one" in done.stderr


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights"):
        load_model(config_only(tmp_path / "bare", omni_config(SMALL)))


def test_missing_shard(omni_copy: Path) -> None:
    shard = sorted(omni_copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}: no such file"):
        load_model(str(omni_copy))
    open_meta(str(omni_copy))  # planning needs none of them


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(omni_copy: Path, keep: int) -> None:
    shard = sorted(omni_copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelError, match=f"{shard.name}: .*cut short"):
        load_model(str(omni_copy))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\x03\x04" + bytes(64), "cut short or not safetensors"),
        (struct.pack("<Q", 2) + b"[]", "the header isn't readable"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "the header isn't readable"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "the header isn't readable"),
        (
            struct.pack("<Q", 57) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'[:57],
            "the header isn't readable",
        ),
        (
            struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}' + bytes(4),
            r"a \[2\] F32 takes 8 bytes, not 4",
        ),
        (
            struct.pack("<Q", 61) + b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}' + bytes(4),
            "a is of 'F33', which is no dtype of safetensors",
        ),
        (
            struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}' + bytes(8),
            "a begins at byte 4 of the data, where byte 0 is wanted",
        ),
    ],
)
def test_corrupt_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        checkpoint_headers(tmp_path)


def drop(directory: Path, name: str, *, from_index: bool) -> str:
    """Remove one tensor from its shard; the shard's name."""
    file = index_of(directory)[name]
    tensors = load_file(directory / file)
    del tensors[name]
    save_file(tensors, directory / file, metadata={"format": "pt"})
    if from_index:
        edit(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    return file


EXPERT = "talker.model.layers.1.mlp.experts.3.up_proj.weight"


def test_tensor_that_the_index_promises_is_absent(omni_copy: Path) -> None:
    file = drop(omni_copy, EXPERT, from_index=False)
    with pytest.raises(ModelError, match=f"{file}: {EXPERT} is missing"):
        load_model(str(omni_copy))


@pytest.mark.parametrize("name", [EXPERT, "talker.model.layers.1.mlp.gate.weight", "thinker.lm_head.weight"])
def test_missing_tensor_never_becomes_random(omni_copy: Path, name: str) -> None:
    drop(omni_copy, name, from_index=True)
    with pytest.raises(ModelError, match=f"({name} is missing|missing from the checkpoint, first {name})"):
        load_model(str(omni_copy))


def test_an_expert_of_another_shape_than_the_others_is_named(omni_copy: Path) -> None:
    shard = omni_copy / index_of(omni_copy)[EXPERT]
    tensors = load_file(shard)
    save_file(tensors | {EXPERT: tensors[EXPERT].T.contiguous()}, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{EXPERT} is \[64, 32\], and that of other experts \[32, 64\]"):
        load_model(str(omni_copy))


@pytest.mark.parametrize("expert", ["15.", ""])
def test_whole_experts_missing(omni_copy: Path, expert: str) -> None:
    for name in index_of(omni_copy):
        if name.startswith(f"thinker.model.layers.0.mlp.experts.{expert}"):
            drop(omni_copy, name, from_index=True)
    with pytest.raises(ModelError, match=r"weights don't fit .* first .*thinker\.model\.layers\.0\.mlp\.experts"):
        load_model(str(omni_copy))


def test_left_over_and_misshapen_tensors(write_tiny: WriteTiny, tmp_path: Path) -> None:
    source = write_tiny("float32")
    tensors = load_file(source / "model.safetensors")
    for change, message in (
        ({"model.extra.weight": torch.zeros(2)}, "not in the model, first model.extra.weight"),
        ({"lm_head.weight": torch.zeros(64, 16)}, "of another shape in the checkpoint, first .*lm_head.weight"),
    ):
        model = Path(config_only(tmp_path / str(len(change)), json.loads((source / "config.json").read_text())))
        save_file(tensors | change, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_model(str(model))


def test_index_that_lies(omni_copy: Path) -> None:
    path = omni_copy / "model.safetensors.index.json"
    edit(path, lambda index: index["weight_map"].update({EXPERT: "../elsewhere.safetensors"}))
    with pytest.raises(ModelError, match="is not a file of this directory"):
        checkpoint_headers(omni_copy)
    edit(path, lambda index: index["weight_map"].pop(EXPERT))
    with pytest.raises(ModelError, match=f"holds {EXPERT}, which the index doesn't say"):
        checkpoint_headers(omni_copy)
    path.write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        checkpoint_headers(omni_copy)


@pytest.mark.parametrize(
    "header",
    [
        "[" * 90000,
        '{"a":' + "1" * 6000 + "}",
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        "[]",
        "{",
    ],
)
def test_headers_that_cant_be_read(header: str, tmp_path: Path) -> None:
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: not safetensors: the header isn't readable"):
        checkpoint_headers(tmp_path)


@pytest.mark.parametrize("config", ["[" * 100000, '{"a": ' + "1" * 5000 + "}", "[]", "{", ""])
def test_configs_that_arent(config: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json.*: (not valid JSON|a JSON object)"):
        open_meta(config_only(tmp_path / "odd", config))


def test_headers(omni_dir: Path) -> None:
    headers = checkpoint_headers(omni_dir)
    assert headers.keys() == index_of(omni_dir).keys()
    assert headers[EXPERT] == ("F32", (32, 64))
    assert headers["talker.model.layers.1.mlp.shared_expert.down_proj.weight"] == ("F32", (64, 64))


def test_hub_id_from_the_local_cache(write_tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--some--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(write_tiny("float32"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opened = load_model("some/tiny")
    assert opened.name == "some/tiny"
    assert type(opened.module).__name__ == "Qwen2MoeForCausalLM"
    with pytest.raises(ModelError, match="some/other: no such directory, and it can't be fetched from the hub"):
        open_meta("some/other")


def test_importing_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'safetensors'}"
    code = f"import sys, moe_surgery.models.opening; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
