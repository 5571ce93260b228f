"""Checkpoints for benchmarks/served.py in bfloat16, and adapters for them, all of random weights.

The naive talker is of the published size, with fewer layers; the unfused DeepSeek block is as wide, with fewer experts.
gpt-oss is written in MXFP4 as it is published, and is tiny.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import talker_checkpoint as talker
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DEEPSEEK: dict[str, Any] = {
    "architectures": ["UnfusedDeepseekForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": talker.VOCABULARY,
    "hidden_size": talker.HIDDEN,
    "intermediate_size": 512,
    "num_attention_heads": talker.HEADS,
    "num_key_value_heads": talker.KV_HEADS,
    "head_dim": talker.HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "tie_word_embeddings": False,
    "use_cache": True,
    "attention_bias": True,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1.0,
    "rope_theta": 1000000.0,
    "dtype": "bfloat16",
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "initial_context_length": 4096,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}


class _Draw:
    """Random tensors in bfloat16, made on the GPU if there is one; matrices about keep the scale of their input."""

    def __init__(self, seed: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, std: float | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (values * (shape[-1] ** -0.5 if std is None else std)).to("cpu", torch.bfloat16)

    def norm(self, size: int) -> Tensor:
        return (1 + self(size, std=0.1).float()).bfloat16()

    def bytes(self, *shape: int, low: int = 0, high: int = 256) -> Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.to("cpu", torch.uint8)


def write(kind: str, folder: Path, layers: int, experts: int) -> None:
    """Write a model of ``kind`` (naive_talker, unfused_deepseek or gpt_oss) into ``folder``, which is made."""
    if kind == "naive_talker":
        talker.write(folder, layers, experts=experts)
        return
    folder.mkdir(parents=True)
    config = {**(DEEPSEEK if kind == "unfused_deepseek" else GPT_OSS)}
    tensors = _gpt_oss() if kind == "gpt_oss" else _deepseek(layers, experts)
    if kind != "gpt_oss":
        config |= {"num_hidden_layers": layers, "n_routed_experts": experts}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _attention(draw: _Draw, at: str, config: dict[str, Any]) -> dict[str, Tensor]:
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    sizes = {"q": heads, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    out = {f"{at}.{name}_proj.weight": draw(count * head, hidden) for name, count in sizes.items()}
    out |= {f"{at}.{name}_proj.bias": draw(count * head, std=0.1) for name, count in sizes.items()}
    return out | {f"{at}.o_proj.weight": draw(hidden, heads * head)}


def _around(draw: _Draw, config: dict[str, Any], layers: int) -> dict[str, Tensor]:
    """Everything but the blocks."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    out = {"model.embed_tokens.weight": draw(vocabulary, hidden, std=1.0), "model.norm.weight": draw.norm(hidden)}
    out["lm_head.weight"] = draw(vocabulary, hidden)
    for index in range(layers):
        at = f"model.layers.{index}"
        out |= {f"{at}.{name}.weight": draw.norm(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        out |= _attention(draw, f"{at}.self_attn", config)
    return out


def _deepseek(layers: int, experts: int) -> dict[str, Tensor]:
    draw, c = _Draw(1), DEEPSEEK
    hidden, width = c["hidden_size"], c["moe_intermediate_size"]

    def mlp(name: str, width: int) -> dict[str, Tensor]:
        parts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        return {f"{name}.{part}.weight": draw(*shape) for part, shape in parts.items()}

    out = _around(draw, c, layers)
    for index in range(layers):
        at = f"model.layers.{index}.mlp"
        out[f"{at}.gate.weight"] = draw(experts, hidden)
        out[f"{at}.gate.e_score_correction_bias"] = draw(experts, std=0.2).float()
        for expert in range(experts):
            out |= mlp(f"{at}.experts.{expert}", width)
        out |= mlp(f"{at}.shared_experts", c["n_shared_experts"] * width)
    return out


def _gpt_oss() -> dict[str, Tensor]:
    draw, c = _Draw(2), GPT_OSS
    hidden, width, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    out = _around(draw, c, c["num_hidden_layers"])
    for index in range(c["num_hidden_layers"]):
        at = f"model.layers.{index}"
        out[f"{at}.self_attn.o_proj.bias"] = draw(hidden, std=0.1)
        out[f"{at}.self_attn.sinks"] = draw(c["num_attention_heads"], std=1.0)
        out[f"{at}.mlp.router.weight"] = draw(experts, hidden)
        out[f"{at}.mlp.router.bias"] = draw(experts, std=0.1)
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            # Values of 0 to 6, times 2^-6 or 2^-7: about as large as the square root of 1 / columns.
            out[f"{at}.mlp.experts.{name}_blocks"] = draw.bytes(experts, rows, columns // 32, 16)
            out[f"{at}.mlp.experts.{name}_scales"] = draw.bytes(experts, rows, columns // 32, low=120, high=122)
            out[f"{at}.mlp.experts.{name}_bias"] = draw(experts, rows, std=0.1)
    return out


ADAPTERS = ("attention", "experts", "shared")
RANK = 8
_WHERE = {
    "attention": (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.o_proj"),
    "experts": (".mlp.experts.",),
    "shared": (".mlp.shared_expert.", ".mlp.shared_experts."),
}


def write_adapter(source: Path, folder: Path, part: str) -> None:
    """A LoRA adapter as PEFT saves it, on every projection of one ``part`` of the bfloat16 model in ``source``."""
    folder.mkdir(parents=True)
    draw, out = _Draw(ADAPTERS.index(part)), {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if name.endswith("_proj.weight") and any(where in name for where in _WHERE[part]):
                rows, columns = tensor.shape
                out[f"base_model.model.{module}.lora_A.weight"] = draw(RANK, columns)
                out[f"base_model.model.{module}.lora_B.weight"] = draw(rows, RANK)
    save_file(out, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({name.split(".")[-3] for name in out})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": names,
        "bias": "none",
        "base_model_name_or_path": str(source),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
