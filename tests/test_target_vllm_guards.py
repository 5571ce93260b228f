"""What a swapped block can't do is an error that says so, and what others expect of the old block goes on working."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from vllm_blocks import SPEC, TARGET, build, tokens

from moe_surgery.errors import GradientError, SurgeryError
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.targets.likeness import Likeness
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.weights.tensors import BlockTensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


def test_asks_for_no_gradients() -> None:
    block, x = build(), tokens(SPEC, 3)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not block(x).requires_grad
    with pytest.raises(GradientError, match="no backward pass"):
        block(x.clone().requires_grad_())
    with torch.no_grad():
        block(x.clone().requires_grad_())
    model = nn.Sequential(block)
    model.requires_grad_(True)
    with pytest.raises(GradientError, match="no backward pass"):
        model(x)
    model.requires_grad_(False).train()
    with torch.no_grad(), pytest.raises(GradientError, match="inference"):
        model(x)
    assert model.eval()(x).shape == x.shape


def test_refuses_other_dtypes_and_autocast() -> None:
    block, x = build(), tokens(SPEC, 3)
    with torch.no_grad():
        with pytest.raises(SurgeryError, match=r"built for torch.float32 on cpu; got torch.bfloat16"):
            block(x.bfloat16())
        with pytest.raises(SurgeryError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            block(x)


@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.state_dict(),
        lambda model: model.load_state_dict({}, strict=False),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.double(),
        lambda model: model.to("meta"),
        lambda model: model.to_empty(device="meta"),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
    ],
    ids=["save", "load", "bfloat16", "double", "device", "to_empty", "copy", "deepcopy", "pickle"],
)
def test_what_would_lose_the_weights_is_an_error(action) -> None:
    block, x = build(), tokens(SPEC, 3)
    with torch.no_grad():
        before = block(x)
        with pytest.raises(SurgeryError, match="swapped MoE block"):
            action(block if action in (copy.copy, copy.deepcopy, pickle.dumps) else nn.ModuleList([block]))
        assert torch.equal(block(x), before)


def test_conversions_that_change_nothing_pass() -> None:
    block, x = build(), tokens(SPEC, 3)
    with torch.no_grad():
        before = block(x)
        assert torch.equal(nn.Sequential(block).to("cpu").float()(x), before)


def observed(router: nn.Module) -> ObservedRouter:
    return ObservedRouter(router, Likeness.of(router, "gate"))


def test_hooks_on_the_replaced_router_go_on_firing() -> None:
    def spoil(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        output.zero_()

    block, x = build(), tokens(SPEC, 2, 3)
    router = nn.Linear(SPEC.hidden, 8, bias=False)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        before = block(x)
        block.observe("gate", observed(router))
        assert torch.equal(block(x), before) and not seen
        router.register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(block(x), before)
        assert len(seen) == 1 and torch.equal(seen[0], router(x.view(-1, SPEC.hidden)))
        for register in (
            lambda: router.register_forward_hook(lambda module, args, output: output * 0),
            lambda: router.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
            lambda: router.register_forward_hook(spoil),
        ):
            handle = register()
            with pytest.raises(SurgeryError, match="gate: a hook changes what this router gets or gives"):
                block(x)
            handle.remove()
            assert torch.equal(block(x), before)
    with pytest.raises(ValueError, match="'fused'"):
        block.observe("fused", observed(router))


@pytest.mark.parametrize("asked", ["before", "after"])
def test_transformers_records_router_logits(asked: str) -> None:
    """Its hooks are put on the routers when the logits are first asked for: before the blocks are swapped, or after."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = configuration.Qwen3OmniMoeTalkerTextConfig(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        norm_topk_prob=True,
        layer_types=["full_attention"] * 2,
    )
    spec = MoESpec(
        64,
        RouterSpec(8, 2, "softmax", True),
        ExpertsSpec(8, 48, "silu"),
        SharedSpec(96, "silu", "sigmoid"),
    )
    torch.manual_seed(0)
    model = modeling.Qwen3OmniMoeTalkerModel(config).eval()
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x = tokens(SPEC, 2, 5)
    with torch.no_grad():
        untouched = modeling.Qwen3OmniMoeTalkerModel(config).eval()
        untouched.load_state_dict(model.state_dict())
        wanted = untouched(inputs_embeds=x, output_router_logits=True)
        if asked == "before":
            model(inputs_embeds=x, output_router_logits=True)
        for index, layer in enumerate(model.layers):
            old, shared = layer.mlp, layer.mlp.shared_expert
            tensors = BlockTensors(
                old.gate.weight.data,
                old.experts.gate_up_proj.data,
                old.experts.down_proj.data,
                shared.gate_proj.weight.data,
                shared.up_proj.weight.data,
                shared.down_proj.weight.data,
                old.shared_expert_gate.weight.data,
                False,
            )
            layer.mlp = TARGET.build(spec, tensors, prefix=f"layers.{index}.mlp")
            layer.mlp.observe("gate", observed(old.gate))
        got = model(inputs_embeds=x, output_router_logits=True)
    assert len(got.router_logits) == 2
    for one, other in zip((got[0], *got.router_logits), (wanted[0], *wanted.router_logits), strict=True):
        # Two layers of float32 sums over some hundred terms each.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
