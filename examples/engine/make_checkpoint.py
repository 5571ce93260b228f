"""Write a tiny checkpoint for one of the example models, in the Hugging Face format, with random weights.

    python examples/engine/make_checkpoint.py KIND DIR [--seed 0] [--layers 3] [--fused]

KIND is naive_talker, omni_talker, unfused_qwen2, unfused_deepseek, list_moe or list_moe_whole. Routed experts are
written as one 2-D tensor per expert and projection, or, with --fused (unfused_qwen2 only), as 3-D ``gate_up_proj`` and
``down_proj``.
The same arguments write the same files; a fused checkpoint has the values of the one that isn't. The tokenizer knows
one word per token, w000 to w127, so that a server can be asked in text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# 32 is the least head size that vLLM has attention kernels for on CPU.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 4, 2, 32, 128
EXPERTS, TOP_K, WIDTH, SHARED_WIDTH = 8, 2, 32, 64

COMMON = {
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": SHARED_WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": WIDTH,
    "tie_word_embeddings": False,
    "use_cache": True,
}
QWEN = {
    "num_experts": EXPERTS,
    "shared_expert_intermediate_size": SHARED_WIDTH,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "naive_talker": {
        "architectures": ["NaiveTalkerForCausalLM"],
        "model_type": "qwen3_omni_moe_talker_text",
        "attention_bias": False,
        "norm_topk_prob": True,
        **QWEN,
    },
    "unfused_qwen2": {
        "architectures": ["UnfusedQwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        **QWEN,
    },
    "unfused_deepseek": {
        "architectures": ["UnfusedDeepseekForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": SHARED_WIDTH // WIDTH,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "rope_theta": 1000000.0,
    },
    "list_moe": {
        "architectures": ["ListMoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": True,
        **QWEN,
    },
}
CONFIGS["omni_talker"] = {**CONFIGS["naive_talker"], "architectures": ["OmniTalkerForCausalLM"]}
CONFIGS["list_moe_whole"] = {**CONFIGS["list_moe"], "whole_shared_expert": True}

_TALKERS = ("naive_talker", "omni_talker")

Draw = Callable[..., "torch.Tensor"]


def _attention(draw: Draw, prefix: str, *, head_norms: bool) -> dict[str, torch.Tensor]:
    """With norms per head (Qwen3), or with biases on query, key and value (Qwen2)."""
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    out = {f"{prefix}.{n}_proj.weight": draw(count * HEAD_DIM, HIDDEN) for n, count in heads.items()}
    if head_norms:
        out |= {f"{prefix}.{n}_norm.weight": 1 + draw(HEAD_DIM, std=0.1) for n in "qk"}
    else:
        out |= {f"{prefix}.{n}_proj.bias": draw(count * HEAD_DIM, std=0.1) for n, count in heads.items()}
    return out | {f"{prefix}.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM)}


def _mlp(draw: Draw, prefix: str, width: int) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.gate_proj.weight": draw(width, HIDDEN, gain=1.5),
        f"{prefix}.up_proj.weight": draw(width, HIDDEN, gain=1.5),
        f"{prefix}.down_proj.weight": draw(HIDDEN, width, gain=1.5),
    }


def _block(draw: Draw, prefix: str, *, deepseek: bool, fused: bool, count: int, width: int) -> dict[str, torch.Tensor]:
    import torch

    out = {f"{prefix}.gate.weight": draw(count, HIDDEN)}
    experts = [_mlp(draw, "", width) for _ in range(count)]
    if fused:
        gate_up = [torch.cat([expert[".gate_proj.weight"], expert[".up_proj.weight"]]) for expert in experts]
        out[f"{prefix}.experts.gate_up_proj"] = torch.stack(gate_up)  # [E, 2I, H]
        out[f"{prefix}.experts.down_proj"] = torch.stack([expert[".down_proj.weight"] for expert in experts])
    else:
        out |= {f"{prefix}.experts.{e}{name}": t for e, expert in enumerate(experts) for name, t in expert.items()}
    if deepseek:
        out[f"{prefix}.gate.e_score_correction_bias"] = draw(count, std=0.2)
        return out | _mlp(draw, f"{prefix}.shared_experts", SHARED_WIDTH)
    out |= _mlp(draw, f"{prefix}.shared_expert", SHARED_WIDTH)
    return out | {f"{prefix}.shared_expert_gate.weight": draw(1, HIDDEN)}


def _tensors(kind: str, *, seed: int, layers: int, fused: bool, experts: int, width: int) -> dict[str, torch.Tensor]:
    """Matrices about keep the scale of their input, so that every expert matters and rounding isn't blown up."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, gain: float = 1.0, std: float | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (gain * shape[-1] ** -0.5 if std is None else std)

    out = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN, std=1.0)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        out[f"{layer}.input_layernorm.weight"] = 1 + draw(HIDDEN, std=0.1)
        out |= _attention(draw, f"{layer}.self_attn", head_norms=kind in _TALKERS)
        out[f"{layer}.post_attention_layernorm.weight"] = 1 + draw(HIDDEN, std=0.1)
        out |= _block(
            draw, f"{layer}.mlp", deepseek=kind == "unfused_deepseek", fused=fused, count=experts, width=width
        )
    out["model.norm.weight"] = 1 + draw(HIDDEN, std=0.1)
    out["lm_head.weight"] = draw(VOCAB, HIDDEN)
    return {f"talker.{name}": tensor for name, tensor in out.items()} if kind == "omni_talker" else out


def make(
    kind: str,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 3,
    fused: bool = False,
    experts: int = EXPERTS,
    width: int = WIDTH,
) -> None:
    """Write the checkpoint into ``folder``, which is made, or must be empty.

    ``experts`` and ``width`` may be others for all kinds but unfused_deepseek. ``config.json`` comes last: a folder
    that has it is complete.
    """
    from huggingface_hub import save_torch_state_dict

    if kind not in CONFIGS:
        raise ValueError(f"{kind!r} is none of {', '.join(CONFIGS)}")
    if fused and kind != "unfused_qwen2":
        raise ValueError(f"{kind} has no fused form")
    if layers < 1:
        raise ValueError("at least one layer is needed")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty")
    tensors = _tensors(kind, seed=seed, layers=layers, fused=fused, experts=experts, width=width)
    save_torch_state_dict(tensors, folder, max_shard_size="400KB" if (experts, width) == (EXPERTS, WIDTH) else "1GB")
    _write_tokenizer(folder)
    config = {**CONFIGS[kind], **COMMON, "num_hidden_layers": layers}
    if (experts, width) != (EXPERTS, WIDTH):
        config |= {"num_experts": experts, "moe_intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number:03}": number for number in range(VOCAB)}, unk_token="w000"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w000", eos_token="w001").save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a tiny checkpoint for one of the example models.")
    parser.add_argument("kind", choices=list(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--fused", action="store_true", help="3-D expert tensors (unfused_qwen2 only)")
    given = parser.parse_args(arguments)
    try:
        make(given.kind, given.folder, seed=given.seed, layers=given.layers, fused=given.fused)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
