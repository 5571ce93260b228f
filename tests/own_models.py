"""Tiny checkpoints of the architectures that vLLM has itself, from transformers' families or written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_surgery.models.checkpoint import CONFIG
from moe_surgery.testing.families import Family, families, model_config
from moe_surgery.testing.filling import fill

ARIA = "aria"
# 32 is the least head size that vLLM has attention kernels for on CPU.
SIZES = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
# The one size that it has latent attention for.
SIZES |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
MORE: dict[str, dict[str, Any]] = {
    "axk1": {"first_k_dense_replace": 0},
    "glm4_moe_lite": {"head_dim": 64},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "minimax": {"layer_types": ["full_attention", "full_attention"]},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen3_next": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "qwen4_exp": {"indexer_head_dim": 32},
}
"""What vLLM asks of a family's config to run it on a CPU."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v4": {"mlp_layer_types": ["sparse", "sparse"], "compress_ratios": [1, 1], "num_hash_layers": 0},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
        "routed_scaling_factor": None,
        "sliding_window_size": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "swa_rope_theta": 10000,
        "v_head_dim": 32,
    },
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "olmoe": {"norm_topk_prob": False},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
}
"""What published checkpoints have in their configs, vLLM reads, and transformers doesn't write."""
OPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"limit_mm_per_prompt": {"image": 0}},
    "deepseek_v4": {"load_format": "dummy"},
    "kimi_linear": {"mamba_block_size": 256},
    "qwen3_next": {"dtype": "bfloat16"},
}
ENVIRONMENT = {"mistral4": {"VLLM_MLA_DISABLE": "1"}}
"""What an engine on a CPU is to be started with."""
BY_HAND = ("step3_text",)
VOCABULARY = 128


def names() -> list[str]:
    """Everything that :func:`write` knows: each family of transformers once that generates text, and those by hand."""
    return [*(name for name, entry in families().items() if "#" not in name and _generates(entry)), *BY_HAND]


def _generates(entry: Family) -> bool:
    return entry.inputs in ("ids", "modality") and entry.model_class.endswith("ForCausalLM")


def write(name: str, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint in float32 with random weights, in which what every part of a block does can be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if name in BY_HAND:
        _write_step3(folder)
        return
    model = _aria() if name == ARIA else _model(families()[name], MORE.get(name, {}), seed)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            part.weight.normal_()  # so that tokens differ
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) | PUBLISHED.get(name, {})
    file.write_text(json.dumps(config), encoding="utf-8")
    if name == "longcat_flash":
        _without_identities(folder / "model.safetensors", model.config.n_routed_experts)


def _model(chosen: Family, more: Mapping[str, Any], seed: int) -> Any:
    config = model_config(chosen, {**SIZES, "vocab_size": VOCABULARY, **more})
    module = import_module(f"transformers.models.{chosen.folder}.modeling_{chosen.folder}")
    model = getattr(module, chosen.model_class)(config).float().eval().requires_grad_(False)
    fill(model, torch.Generator().manual_seed(seed + 1), chosen.config.get("shift", {}))
    return model


def _aria() -> Any:
    """The one model of the family that vLLM has: with an encoder for pictures."""
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig, Idefics3VisionConfig

    text = AriaTextConfig(**model_config(families()[ARIA], {**SIZES, "vocab_size": VOCABULARY}).to_dict())
    vision = Idefics3VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = AriaConfig(text_config=text, vision_config=vision, projector_patch_to_query_dict={16: 8})
    model = AriaForConditionalGeneration(config).float().eval().requires_grad_(False)
    fill(model.model.language_model, torch.Generator().manual_seed(1), {})
    return model


def _without_identities(file: Path, experts: int) -> None:
    """transformers holds rows for the experts that return their input, and writes them; nobody publishes any."""
    kept = {
        name: tensor
        for name, tensor in load_file(file).items()
        if (number := re.search(r"\.experts\.(\d+)\.", name)) is None or int(number[1]) < experts
    }
    save_file(kept, file, metadata={"format": "pt"})


def _write_step3(folder: Path) -> None:
    """Of Step 3's language model, which transformers has no class for: one dense layer, two with experts."""
    hidden, head, heads, query, experts, width, shared, layers = 64, 32, 2, 64, 8, 32, 64, 3

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) * 1.5 / shape[-1] ** 0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden),
        "lm_head.weight": matrix(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        attention = {
            "q_proj": matrix(query, hidden),
            "k_proj": matrix(head, hidden),
            "v_proj": matrix(head, hidden),
            "inter_norm": torch.ones(query),
            "wq": matrix(head * heads, query),
            "o_proj": matrix(hidden, head * heads),
        }
        tensors |= {f"{layer}.self_attn.{name}.weight": tensor for name, tensor in attention.items()}
        tensors |= {f"{layer}.{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
        if number:
            routed = {
                "gate": matrix(experts, hidden),
                "gate_proj": matrix(experts, width, hidden),
                "up_proj": matrix(experts, width, hidden),
                "down_proj": matrix(experts, hidden, width),
            }
            tensors |= {f"{layer}.moe.{name}.weight": tensor for name, tensor in routed.items()}
        mlp = {"gate_proj": (shared, hidden), "up_proj": (shared, hidden), "down_proj": (hidden, shared)}
        place = f"{layer}.{'share_expert' if number else 'mlp'}"
        tensors |= {f"{place}.{name}.weight": matrix(*shape) for name, shape in mlp.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "torch_dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": shared,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "moe_intermediate_size": width,
        "moe_num_experts": experts,
        "moe_top_k": 2,
        "moe_layers_enum": "1,2",
        "norm_expert_weight": True,
        "share_expert_dim": shared,
        "share_q_dim": query,
        "head_dim": head,
        "max_position_embedding": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
