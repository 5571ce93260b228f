"""A checkpoint of the example model naive_talker at the published size of Qwen3-Omni's talker, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, EXPERTS, WIDTH, SHARED, TOP_K, VOCABULARY = 1024, 128, 384, 768, 6, 3072
HEADS, KV_HEADS, HEAD = 16, 2, 128
CONFIG: dict[str, Any] = {
    "architectures": ["NaiveTalkerForCausalLM"],
    "model_type": "qwen3_omni_moe_talker_text",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": SHARED,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": SHARED,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "attention_bias": False,
    "use_cache": True,
}


def write(folder: Path, layers: int, *, seed: int = 0, experts: int = EXPERTS) -> None:
    """Random weights that about keep the scale of their input, one file for each layer; 300 MB each."""
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (values * (shape[-1] ** -0.5 if std is None else std)).to("cpu", torch.bfloat16)

    def norm(size: int) -> torch.Tensor:
        return (1 + draw(size, std=0.1).float()).to(torch.bfloat16)

    def mlp(name: str, width: int) -> dict[str, torch.Tensor]:
        parts = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
        return {f"{name}.{part}.weight": draw(*shape) for part, shape in parts.items()}

    files = {
        "top": {
            "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, std=1.0),
            "model.norm.weight": norm(HIDDEN),
            "lm_head.weight": draw(VOCABULARY, HIDDEN),
        }
    }
    for index in range(layers):
        at = f"model.layers.{index}"
        tensors = {f"{at}.{name}.weight": norm(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = draw(heads * HEAD, HIDDEN)
        tensors[f"{at}.self_attn.o_proj.weight"] = draw(HIDDEN, HEADS * HEAD)
        tensors |= {f"{at}.self_attn.{name}_norm.weight": norm(HEAD) for name in ("q", "k")}
        tensors[f"{at}.mlp.gate.weight"] = draw(experts, HIDDEN)
        for expert in range(experts):
            tensors |= mlp(f"{at}.mlp.experts.{expert}", WIDTH)
        tensors |= mlp(f"{at}.mlp.shared_expert", SHARED)
        tensors[f"{at}.mlp.shared_expert_gate.weight"] = draw(1, HIDDEN)
        files[f"layer-{index:02}"] = tensors
    places = {}
    for name, tensors in files.items():
        save_file(tensors, folder / f"model-{name}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, f"model-{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "num_experts": experts, "num_hidden_layers": layers}, indent=1) + "\n"
    )
