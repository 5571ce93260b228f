"""Whole models of transformers on a GPU, compiled: nothing of the new blocks breaks a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import moe_surgery

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def qwen2() -> Any:
    """Its blocks become one operator each."""
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=8, shared_expert_intermediate_size=64))


def deepseek_v3() -> Any:
    """Its blocks become a router and the experts behind it; the first layer has none."""
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = DeepseekV3Config(**SIZES, **heads, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("build", [qwen2, deepseek_v3])
def test_no_graph_breaks(build: Any) -> None:
    """Breaks are counted, since ``fullgraph`` isn't what ``generate`` compiles with."""
    torch.manual_seed(0)
    model = build().to("cuda", torch.bfloat16).eval()
    ids = torch.arange(1, 9, device="cuda")[None]
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    report = moe_surgery.apply(model)
    assert report.versions["GPU"] == torch.cuda.get_device_name()
    assert {step.target for step in report.replaced} == {"folded"} and len(report.replaced) == len(report.steps) > 0
    eager = model.generate(ids, **options)
    torch._dynamo.reset()
    counters.clear()
    compiled = model.generate(ids, cache_implementation="static", **options)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert torch.equal(compiled, eager)
