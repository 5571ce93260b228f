"""The config of Qwen3-Omni with the published fields, for the published sizes and for small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder stack. ``width`` is a routed expert's; ``heads`` are query and key/value heads."""

    layers: int
    hidden: int
    heads: tuple[int, int]
    experts: int
    top_k: int
    width: int
    vocab: int
    mlp: int


@dataclass(frozen=True)
class Sizes:
    """Everything in which a small checkpoint differs from the published one."""

    thinker: Decoder
    talker: Decoder
    shared_width: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    accept_layer: int
    tokens: int
    codec: int
    codebook: int
    code_groups: int
    predictor: tuple[int, int]
    predictor_heads: tuple[int, int]
    vocoder: tuple[int, int, int, int]
    audio: tuple[int, int, int, int, int, int]
    vision: tuple[int, int, int, int, int, int]
    deepstack: tuple[int, ...]


# Qwen3-Omni-30B-A3B as published. `tokens` and `codec` are where the special tokens of the text and of the codec
# vocabulary start; `predictor` is (layers, MLP width), `vocoder` (layers, hidden, MLP width, decoder width), `audio`
# (layers, heads, hidden, MLP width, convolution channels, mel bins), and `vision` (layers, heads, hidden, MLP width,
# patch size, positions).
FULL = Sizes(
    thinker=Decoder(layers=48, hidden=2048, heads=(32, 4), experts=128, top_k=8, width=768, vocab=152064, mlp=768),
    talker=Decoder(layers=20, hidden=1024, heads=(16, 2), experts=128, top_k=6, width=384, vocab=3072, mlp=2048),
    shared_width=768,
    head_dim=128,
    mrope_section=(24, 20, 20),
    accept_layer=24,
    tokens=151643,
    codec=2048,
    codebook=2048,
    code_groups=16,
    predictor=(5, 3072),
    predictor_heads=(16, 8),
    vocoder=(8, 1024, 3072, 1536),
    audio=(32, 20, 1280, 5120, 480, 128),
    vision=(27, 16, 1152, 4304, 16, 2304),
    deepstack=(8, 16, 24),
)

# Every width a multiple of 32, which vLLM's CPU kernels ask of hidden and expert sizes.
SMALL = Sizes(
    thinker=Decoder(layers=4, hidden=64, heads=(4, 2), experts=16, top_k=8, width=32, vocab=512, mlp=32),
    talker=Decoder(layers=20, hidden=64, heads=(4, 2), experts=16, top_k=6, width=32, vocab=1280, mlp=128),
    shared_width=64,
    head_dim=16,
    mrope_section=(4, 2, 2),
    accept_layer=2,
    tokens=472,
    codec=256,
    codebook=256,
    code_groups=16,
    predictor=(2, 96),
    predictor_heads=(4, 2),
    vocoder=(2, 64, 96, 64),
    audio=(1, 4, 64, 96, 8, 32),
    vision=(2, 4, 64, 96, 4, 64),
    deepstack=(0,),
)


def _decoder(sizes: Decoder, common: Sizes, model_type: str, shared_width: int) -> dict[str, Any]:
    """The ``text_config`` of the thinker (no shared expert: width 0) or of the talker."""
    return {
        "model_type": model_type,
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads[0],
        "num_key_value_heads": sizes.heads[1],
        "head_dim": common.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "interleaved": True,
            "mrope_interleaved": True,
            "mrope_section": list(common.mrope_section),
            "rope_type": "default",
        },
        "rope_theta": 1000000,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.width,
        "shared_expert_intermediate_size": shared_width,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def omni_config(sizes: Sizes, dtype: str = "bfloat16") -> dict[str, Any]:
    """``config.json`` of a Qwen3-Omni checkpoint of these sizes, with the fields of the published one.

    It carries two fields that transformers' config classes have no default for: the talker's ``spatial_merge_size``
    and its text config's ``shared_expert_intermediate_size``.
    """
    token, codec = sizes.tokens, sizes.codec
    audio_layers, audio_heads, audio_hidden, audio_mlp, audio_channels, mels = sizes.audio
    depth, vision_heads, vision_hidden, vision_mlp, patch, positions = sizes.vision
    vocoder_layers, vocoder_hidden, vocoder_mlp, decoder_dim = sizes.vocoder
    media = {
        "audio_token_id": token + 32,
        "image_token_id": token + 12,
        "video_token_id": token + 13,
        "audio_start_token_id": token + 26,
        "audio_end_token_id": token + 27,
        "vision_start_token_id": token + 9,
        "position_id_per_seconds": 13,
    }
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "dtype": dtype,
        "enable_audio_output": True,
        "im_start_token_id": token + 1,
        "im_end_token_id": token + 2,
        "tts_pad_token_id": token + 28,
        "tts_bos_token_id": token + 29,
        "tts_eos_token_id": token + 30,
        "system_token_id": 8948 % token,
        "user_token_id": 872 % token,
        "assistant_token_id": 77091 % token,
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker",
            "dtype": dtype,
            **media,
            "user_token_id": 872 % token,
            "text_config": _decoder(sizes.thinker, sizes, "qwen3_omni_moe_text", shared_width=0),
            "audio_config": {
                "model_type": "qwen3_omni_moe_audio_encoder",
                "encoder_layers": audio_layers,
                "encoder_attention_heads": audio_heads,
                "d_model": audio_hidden,
                "encoder_ffn_dim": audio_mlp,
                "downsample_hidden_size": audio_channels,
                "num_mel_bins": mels,
                "max_source_positions": 1500,
                "output_dim": sizes.thinker.hidden,
                "activation_function": "gelu",
                "n_window": 50,
                "n_window_infer": 800,
                "conv_chunksize": 500,
            },
            "vision_config": {
                "model_type": "qwen3_omni_moe_vision_encoder",
                "depth": depth,
                "num_heads": vision_heads,
                "hidden_size": vision_hidden,
                "intermediate_size": vision_mlp,
                "patch_size": patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": positions,
                "out_hidden_size": sizes.thinker.hidden,
                "deepstack_visual_indexes": list(sizes.deepstack),
                "hidden_act": "gelu_pytorch_tanh",
                "in_channels": 3,
            },
        },
        "talker_config": {
            **media,
            "accept_hidden_layer": sizes.accept_layer,
            "thinker_hidden_size": sizes.thinker.hidden,
            "spatial_merge_size": 2,
            "num_code_groups": sizes.code_groups,
            "codec_pad_id": codec + 100,
            "codec_bos_id": codec + 101,
            "codec_eos_token_id": codec + 102,
            "codec_nothink_id": codec + 107,
            "codec_think_bos_id": codec + 108,
            "codec_think_eos_id": codec + 109,
            "speaker_id": {"chelsie": codec + 253, "ethan": codec + 254, "aiden": codec + 255},
            "text_config": _decoder(sizes.talker, sizes, "qwen3_omni_moe_talker_text", sizes.shared_width),
            "code_predictor_config": {
                "model_type": "qwen3_omni_moe_talker_code_predictor",
                "vocab_size": sizes.codebook,
                "hidden_size": sizes.talker.hidden,
                "intermediate_size": sizes.predictor[1],
                "num_hidden_layers": sizes.predictor[0],
                "layer_types": ["full_attention"] * sizes.predictor[0],
                "num_attention_heads": sizes.predictor_heads[0],
                "num_key_value_heads": sizes.predictor_heads[1],
                "head_dim": sizes.head_dim,
                "num_code_groups": sizes.code_groups,
                "max_position_embeddings": 32768,
                "rope_theta": 1000000,
            },
        },
        "code2wav_config": {
            "codebook_size": sizes.codebook,
            "num_quantizers": sizes.code_groups,
            "num_hidden_layers": vocoder_layers,
            "hidden_size": vocoder_hidden,
            "intermediate_size": vocoder_mlp,
            "decoder_dim": decoder_dim,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "sliding_window": 72,
            "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2],
            "rope_theta": 10000,
        },
    }
