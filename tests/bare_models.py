"""Tiny configs of the sparse-MoE architectures that vLLM has and transformers hasn't. vLLM itself fills the weights.

What a model's loader would make of a checkpoint is so not seen; what is built, read, exchanged and proven is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_surgery.models.checkpoint import CONFIG

_LAYERS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_GROUPED: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_BAILING: dict[str, Any] = {
    "embedding_dropout": 0.0,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
}
_BIASED: dict[str, Any] = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "router_dtype": "fp32"}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_moe": ("BailingMoeForCausalLM", _BAILING | {"routed_scaling_factor": 1.0}),
    "bailing_moe_v2": ("BailingMoeV2ForCausalLM", _BAILING | _BIASED | _GROUPED),
    "deepseek": ("DeepseekForCausalLM", {"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False}),
    "k2_horizon": (
        "K2HorizonForCausalLM",
        {
            "attention_bias": False,
            "attention_gate_func": None,
            "decoder_sparse_step": 1,
            "layernorm_num_groups": 1,
            "mlp_only_layers": [0],
            "moe_gate_bias": True,
            "mova_num_experts": 0,
            "mova_num_experts_per_tok": 0,
            "query_key_norm": True,
            "rope_head_dim": 32,
            "router_scaling_factor": 2.5,
            "router_score_func": "sigmoid",
        },
    ),
    "minicpm_moe": ("MiniCPMForCausalLM", {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0}),
    "pangu_pro_moe_v2": ("PanguProMoEV2ForCausalLM", {"router_enable_expert_bias": True, "sandwich_norm": True}),
    "pangu_ultra_moe": ("PanguUltraMoEForCausalLM", _LATENT | {"router_enable_expert_bias": True}),
    "param2moe": ("Param2MoEForCausalLM", _BIASED | _GROUPED | {"use_qk_norm": True}),
    "sarvam_mla": (
        "SarvamMLAForCausalLM",
        _LATENT | _BIASED | {"head_dim": 576, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "sarvam_moe": ("SarvamMoEForCausalLM", _BAILING | _BIASED | {"n_group": 1, "topk_group": 1}),
    "step3p5": (
        "Step3p5ForCausalLM",
        {
            "num_attention_groups": 2,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "share_expert_dim": 64,
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 2.5,
            "norm_expert_weight": True,
            "use_moe_router_bias": True,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
}
"""By the name that their ``model_type`` has: vLLM's class, and what is its own in the config."""
OPTIONS: dict[str, Any] = {"load_format": "dummy", "trust_remote_code": True}
_CODE = """from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "{name}"
"""


def write(name: str, folder: Path) -> None:
    """Write a folder without weights, and with the config's class, which nobody else has."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture, own = CONFIGS[name]
    config = {
        "architectures": [architecture],
        "model_type": name,
        "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig"},
        **_LAYERS,
        **_EXPERTS,
        **own,
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / "configuration_tiny.py").write_text(_CODE.format(name=name), encoding="utf-8")
