"""The folded target on CPU: the shared expert among the experts of vLLM's routed layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folded_blocks import SPEC, SPECS, but
from proof_blocks import PlainBlock
from spec_weights import weights
from torch import nn
from zoo.around import Alone
from zoo.others import LISTED
from zoo.plain import block_class, make

import moe_surgery
from moe_surgery.prove.proof import prove
from moe_surgery.spec import MoESpec
from moe_surgery.targets import get_target
from moe_surgery.targets.base import Context
from moe_surgery.targets.vllm.block import FusedMoEBlock

TARGET = get_target("folded")
CPU = Context("cpu", "float32")
# 32 is what vLLM's kernels want sizes to be multiples of; narrower experts are filled up.
FITTING = {name: spec for name, spec in SPECS.items() if spec.shared and spec.hidden % 32 == 0}
FITTING["experts that fill the kernels' rows"] = but(experts={"width": 32}, shared={"width": 96})
CLAMPED: dict[str, Any] = {"limit": 7.0, "alpha": 1.702, "offset": 1.0, "width": 32}
FITTING["rows of gate and up in turn"] = but(experts=CLAMPED, shared=CLAMPED)
FITTING["a logit bias"] = but(bias=True)
FITTING["a correction bias"] = but(correction_bias=True, scoring="sigmoid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", FITTING.values(), ids=FITTING)
def test_is_proven(spec: MoESpec, dtype: torch.dtype) -> None:
    tensors, bias = weights(spec, dtype), torch.linspace(-0.5, 0.5, spec.router.num_experts, dtype=dtype)
    if spec.router.bias:
        tensors = replace(tensors, router_bias=bias)
    if spec.router.correction_bias:
        tensors = replace(tensors, correction_bias=bias)
    old, new = (get_target(name).build(spec, tensors, prefix=name) for name in ("reference", "folded"))
    verdict = prove(old, new, spec, tensors)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("mistake", ["slices", "scale", "gate"])
def test_a_wrong_fold_is_rejected(mistake: str) -> None:
    """One slice less, another scale, or the gate's sign turned: the proof tells each."""
    spec = but(shared={"width": 48, "scale": 0.5})
    tensors = weights(spec)
    block: Any = TARGET.build(spec, tensors, prefix="mlp")
    experts = block.fused.runner.routed_experts
    if mistake == "slices":
        experts.w2_weight.data[-1].zero_()
    elif mistake == "scale":
        block.fused.runner.router.custom_routing_function = replace(experts.custom_routing_function, scale=0.6)
    else:
        block.fused_router.data[-1].neg_()
    verdict = prove(PlainBlock(spec, tensors), block, spec, tensors)
    assert not verdict.passed and "the new block is not what the spec says" in verdict.reason


REFUSED = {
    "there is no shared expert to fold": replace(SPEC, shared=None),
    "shared width 40 is not a multiple of the expert width 16 (2 × 16 leaves 8)": but(shared={"width": 40}),
    "the shared expert's activation is gelu, the routed experts' silu": but(shared={"activation": "gelu"}),
    "the shared expert has no part in weighted inputs": but(experts={"weights_on": "input"}),
    "the shared expert has no part in biases in its experts": but(experts={"biases": True}),
    "hidden size 80 is not a multiple of 32": SPECS["sizes that fit no tile"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(reason: str) -> None:
    refusal = TARGET.accepts(REFUSED[reason], CPU)
    assert refusal is not None and refusal.reason.startswith(reason)


def test_weights_are_placed_once_as_the_kernels_lay_out_all_at_once() -> None:
    spec = FITTING["experts that fill the kernels' rows"]
    tensors = weights(spec)
    before = tensors.w13.clone()
    block: Any = TARGET.build(spec, tensors, prefix="mlp")
    plain: Any = get_target("vllm").build(spec, tensors, prefix="other")
    laid_out, whole = (each.fused.runner.routed_experts for each in (block, plain))
    assert laid_out.w13_weight.shape == (11, 64, 64) and whole.w13_weight.shape == (8, 64, 64)
    assert torch.equal(laid_out.w13_weight[:8], whole.w13_weight)
    assert torch.equal(laid_out.w2_weight[:8], whole.w2_weight)
    assert torch.equal(tensors.w13, before)
    assert block.new_bytes == sum(p.nbytes for p in (laid_out.w13_weight, laid_out.w2_weight, block.fused_router))


def test_a_model_is_operated_on_and_put_back(write_tiny: Callable[[str], Path]) -> None:
    from transformers import Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM.from_pretrained(write_tiny("float32")).eval()
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        report = moe_surgery.apply(model, target="folded")
        after = model(ids).logits
    assert [(step.outcome, step.target) for step in report.replaced] == [("replaced", "folded")] * 2
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, FusedMoEBlock)]
    assert len(blocks) == 2 and not any("shared" in name for block in blocks for name, _ in block.named_parameters())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    moe_surgery.undo(report)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_block_that_it_refuses_is_left_alone() -> None:
    block = make(block_class(Alone, *LISTED, name="Alone"))
    model = nn.Sequential(block).eval()
    [step] = moe_surgery.apply(model, target="folded").steps
    assert (step.outcome, step.reason) == ("refused", "there is no shared expert to fold")
    assert model[0] is block
