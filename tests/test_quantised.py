"""Checkpoints of quantised weights: every site is read and shown with its scheme, and refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import moe_surgery
from moe_surgery.errors import ModelError
from moe_surgery.models.opening import load_model
from moe_surgery.models.quantisation import Quantisation, quantisation_of
from moe_surgery.testing.families import build

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SCHEMES: list[tuple[dict[str, Any], str]] = [
    (FP8, "FP8 (e4m3, blocks of 128×128)"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8 (e4m3, one scale for each tensor)"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "NVFP4 (ModelOpt, groups of 16)"),
    (
        {**FP8, "moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION", "group_size": 16},
        "NVFP4 (ModelOpt, groups of 16)",
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"g": {"weights": {"group_size": 16}}}},
        "NVFP4 (ModelOpt, groups of 16)",
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
        "FP8 (ModelOpt, mixed)",
    ),
    (
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"l.0.attn": {"quant_algo": "FP8"}, "l.0.experts": {"quant_algo": "W4A16_NVFP4"}},
        },
        "W4A16_NVFP4 (ModelOpt, mixed)",
    ),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ int4 (groups of 128)"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ int4 (groups of 128)"),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT4}}},
        "int4, scales by group, groups of 32 (compressed-tensors)",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        },
        "FP8, scales by channel (compressed-tensors)",
    ),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": "int4"}}},
        "?, scales by tensor (compressed-tensors)",
    ),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "BITSANDBYTES int4"),
]


@pytest.mark.parametrize("data, scheme", SCHEMES, ids=[scheme for _, scheme in SCHEMES])
@pytest.mark.parametrize("inside", [False, True])
def test_schemes_are_told_by_name(tmp_path: Path, data: dict[str, Any], scheme: str, inside: bool) -> None:
    config: dict[str, Any] = {"quantization_config": data}
    found = quantisation_of(tmp_path, {"text_config": config} if inside else config)
    assert found is not None and found.scheme == scheme
    assert found.where == f"config.json: {'text_config.' * inside}quantization_config"


def test_a_file_beside_the_config_says_it_too(tmp_path: Path) -> None:
    assert quantisation_of(tmp_path, {}) is None
    data = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(data))
    assert quantisation_of(tmp_path, {}) == Quantisation(
        "NVFP4 (ModelOpt, groups of 16)", "hf_quant_config.json: quantization", ("lm_head",)
    )


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt", "fp8"])
def test_a_quantised_cache_is_none_of_weights(tmp_path: Path, method: str) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    data = {"quant_method": method, "quant_algo": None, "config_groups": {}, "kv_cache_scheme": cache}
    found = quantisation_of(tmp_path, {"quantization_config": data})
    assert (found is None) == (method != "fp8")  # whose weights always are


def test_a_model_with_a_quantised_cache_is_loaded(tmp_path: Path) -> None:
    model, _ = build("qwen2_moe")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    written = json.loads((tmp_path / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    written["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": cache}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert {step.outcome for step in moe_surgery.plan(tmp_path).steps} == {"replaced"}
    assert load_model(str(tmp_path)).module is not None


@pytest.mark.parametrize(
    "pattern, path, covered",
    [
        ("lm_head", "model.layers.1.mlp.experts.gate_up_proj", True),
        ("model.layers.1.mlp", "model.layers.1.mlp.experts.gate_up_proj", False),
        ("model.layers.1", "model.layers.11.mlp.experts.gate_up_proj", True),
        ("*.ffn.shared_experts.*", "layers.1.ffn.experts.0", True),
        ("mtp.layers.0*", "mtp.layers.0.mlp.experts", False),
        ("re:.*mlp\\.(gate|up)_proj.*", "model.layers.0.mlp.experts.0.gate_proj", True),
        ("re:.*experts.*", "model.layers.0.mlp.experts.0.gate_proj", False),
        ("experts", "model.layers.0.mlp.experts.gate_up_proj", False),
    ],
)
def test_modules_that_are_left_out(pattern: str, path: str, covered: bool) -> None:
    assert Quantisation("FP8", "", (pattern,)).covers(path) == covered


def test_every_site_is_shown_and_refused_with_its_scheme(tmp_path: Path) -> None:
    model, _ = build("qwen2_moe")
    config = AutoConfig.for_model(**model.config.to_dict())  # type: ignore[attr-defined]
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {**FP8, "modules_to_not_convert": ["model.layers.1"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    first, second = moe_surgery.plan(tmp_path).steps
    assert (first.outcome, second.outcome) == ("refused", "replaced")
    assert first.spec == second.spec
    assert first.reason.startswith("its weights are FP8 (e4m3, blocks of 128×128); convert the checkpoint")
    assert [step.reason[:20] for step in moe_surgery.scan(tmp_path).steps] == ["its weights are FP8 ", "readable"]
    assert moe_surgery.explain(tmp_path, first.path).spec == first.spec
    with pytest.raises(ModelError, match="its weights are FP8"):
        load_model(str(tmp_path))
