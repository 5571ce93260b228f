"""What transformers computes from the example models' checkpoints: the ground that engines are held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from engine.make_checkpoint import EXPERTS
from engine_examples import PROMPTS, Output
from safetensors.torch import load_file

Logits = Callable[[torch.Tensor], torch.Tensor]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def talker_reference(folder: Path) -> Logits:
    """transformers' talker decoder, which has no class with a head that would load such a checkpoint."""
    from transformers import AutoConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerModel

    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["mrope_section"] = [8, 4, 4]  # text positions: the same in all three sections
    model = Qwen3OmniMoeTalkerModel(config).eval()
    weights = {n.removeprefix("talker.").removeprefix("model."): tensor for n, tensor in tensors(folder).items()}
    head, embedding = weights.pop("lm_head.weight"), weights.pop("embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        experts = f"layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{experts}.{e}.{name}_proj.weight") for e in range(EXPERTS)])
            for name in ("gate", "up", "down")
        )
        weights |= {f"{experts}.gate_up_proj": torch.cat([gate, up], dim=1), f"{experts}.down_proj": down}
    model.load_state_dict(weights | {"codec_embedding.weight": embedding})
    return lambda ids: model(inputs_embeds=embedding[ids]).last_hidden_state @ head.T


def reference(kind: str, folder: Path) -> Logits:
    if kind in ("naive_talker", "omni_talker"):
        return talker_reference(folder)
    from transformers import Glm4MoeForCausalLM, Qwen2MoeForCausalLM

    family = Glm4MoeForCausalLM if kind == "unfused_deepseek" else Qwen2MoeForCausalLM
    model, loading = family.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    return lambda ids: model(ids).logits


def check(outputs: list[Output], logits: Logits) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt + output.tokens])
        with torch.no_grad():
            logprobs = logits(ids)[0, :-1].log_softmax(-1)
        assert logprobs[len(prompt) - 1 :].argmax(-1).tolist() == output.tokens
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.prompt_logprobs + output.logprobs), expected, rtol=0, atol=1e-4)
