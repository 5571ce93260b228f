"""The reference: it agrees with transformers' blocks and with a second implementation, and touches what it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof_blocks import TALKER, THINKER, PlainBlock
from spec_weights import weights
from torch import Tensor
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen3_omni
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeTalkerTextConfig,
    Qwen3OmniMoeTextConfig,
)

from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.targets.base import Context
from moe_surgery.targets.reference import Visits, _products, expert_outputs, forward, gated, router_scores
from moe_surgery.targets.reference_target import ReferenceTarget
from moe_surgery.weights.tensors import BlockTensors


def tokens(spec: MoESpec, count: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, spec.hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def relative(got: Tensor, wanted: Tensor) -> float:
    """The worst token's relative L2 distance."""
    wanted = wanted.double()
    return float(((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@st.composite
def specs(draw: st.DrawFn) -> MoESpec:
    experts = draw(st.sampled_from([2, 3, 8, 16]))
    activations = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])
    shared = st.builds(
        SharedSpec,
        width=st.sampled_from([8, 24]),
        activation=activations,
        gate=st.sampled_from(["sigmoid", None]),
        scale=st.sampled_from([1.0, 0.5]),
    )
    return MoESpec(
        hidden=draw(st.sampled_from([16, 40])),
        router=RouterSpec(
            num_experts=experts,
            top_k=draw(st.integers(1, experts)),
            scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
            renormalize=draw(st.booleans()),
            scale=draw(st.sampled_from([1.0, 2.5])),
        ),
        experts=ExpertsSpec(experts, draw(st.sampled_from([8, 24])), draw(activations)),
        shared=draw(st.none() | shared),
    )


@settings(max_examples=60, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**16))
def test_it_agrees_with_a_second_implementation(spec: MoESpec, seed: int) -> None:
    tensors, x = weights(spec, torch.float64, seed=seed), tokens(spec)
    # Both add some hundred terms of size 1 in float64, in different orders; a relu may leave nothing of them.
    block = PlainBlock(spec, tensors)
    block.scores_dtype = torch.float64
    torch.testing.assert_close(forward(spec, tensors, x, torch.float64), block(x), rtol=1e-10, atol=1e-12)


def omni_block(shared: bool, renormalize: bool, dtype: torch.dtype) -> tuple[torch.nn.Module, MoESpec, BlockTensors]:
    """A block of transformers' Qwen3-Omni with random weights, and what it is."""
    spec = TALKER if shared else THINKER
    spec = replace(spec, router=replace(spec.router, renormalize=renormalize))
    kind = Qwen3OmniMoeTalkerTextConfig if shared else Qwen3OmniMoeTextConfig
    config = kind(
        hidden_size=spec.hidden,
        num_experts=spec.router.num_experts,
        num_experts_per_tok=spec.router.top_k,
        moe_intermediate_size=spec.experts.width,
        norm_topk_prob=renormalize,
    )
    config._experts_implementation = "eager"
    tensors = weights(spec, dtype)
    if spec.shared is not None:
        config.shared_expert_intermediate_size = spec.shared.width
        block = qwen3_omni.Qwen3OmniMoeTalkerTextSparseMoeBlock(config)
    else:
        block = qwen3_omni.Qwen3OmniMoeThinkerTextSparseMoeBlock(config)
    named = {
        "gate.weight": tensors.router,
        "experts.gate_up_proj": tensors.w13,
        "experts.down_proj": tensors.w2,
        "shared_expert.gate_proj.weight": tensors.shared_gate_proj,
        "shared_expert.up_proj.weight": tensors.shared_up_proj,
        "shared_expert.down_proj.weight": tensors.shared_down_proj,
        "shared_expert_gate.weight": tensors.shared_gate,
    }
    block.to(dtype).eval().load_state_dict({name: value for name, value in named.items() if value is not None})
    return block, spec, tensors


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_it_agrees_with_transformers(shared: bool, renormalize: bool) -> None:
    block, spec, tensors = omni_block(shared, renormalize, torch.float64)
    x = tokens(spec)
    wanted = block(x[None])[0]
    # transformers keeps the scores in float32, also in a float64 model; so does the block's own arithmetic here.
    assert relative(forward(spec, tensors, x, torch.float64), wanted) < 16 * torch.finfo(torch.float32).eps
    assert relative(forward(spec, tensors, x), wanted) < 1e-12


@torch.no_grad()
def test_its_bfloat16_arithmetic_rounds_where_transformers_rounds() -> None:
    block, spec, tensors = omni_block(True, True, torch.bfloat16)
    x = tokens(spec, dtype=torch.bfloat16)
    truth = forward(spec, tensors, x, torch.float64)
    theirs, ours = relative(block(x[None])[0], truth), relative(forward(spec, tensors, x), truth)
    assert 0.5 < ours / theirs < 2
    # Rounding once, at the end, is a different arithmetic: it would understate the dtype's noise.
    assert relative(forward(spec, tensors, x, torch.float32).bfloat16(), truth) < ours / 2


def test_the_router_rounds_as_the_spec_says() -> None:
    x, tensors = tokens(TALKER, dtype=torch.bfloat16), weights(TALKER, torch.bfloat16)
    wide = replace(TALKER, router=replace(TALKER.router, logits_dtype="float32"))
    native, scores = router_scores(TALKER, tensors.router, x, None)
    assert native.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    exact, _ = router_scores(wide, tensors.router, x, None)
    assert exact.dtype == torch.float32
    assert not torch.equal(native.float(), exact)
    assert router_scores(TALKER, tensors.router, x, torch.float64)[0].dtype == torch.float64
    assert not torch.equal(forward(TALKER, tensors, x), forward(wide, tensors, x))
    kept = replace(TALKER, router=replace(TALKER.router, weights_dtype="float32"))
    assert not torch.equal(forward(TALKER, tensors, x), forward(kept, tensors, x))


def test_only_visited_experts_are_read() -> None:
    tensors = weights(TALKER)
    for weight in (tensors.w13, tensors.w2):
        weight[5] = torch.nan
    x = tokens(TALKER, 8, torch.float32)
    experts = torch.tensor([0, 1, 2, 3, 4, 6, 7, 0])
    [first, second] = expert_outputs(
        tensors,
        [Visits(x, experts, gated("silu")), Visits(x[:1], torch.tensor([5]), gated("silu"))],
        torch.float64,
    )
    assert first.isfinite().all()
    assert second.isnan().all()


def test_a_saturated_sigmoid_does_not_hide_the_order_of_the_logits() -> None:
    spec = MoESpec(2, RouterSpec(3, 1, "sigmoid", True), ExpertsSpec(3, 1, "relu"), None)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    tensors = BlockTensors(
        router=torch.tensor([[100.0, 0], [200.0, 0], [50.0, 0]], dtype=torch.float64),
        w13=torch.tensor([[[1.0, 0], [1.0, 0]]] * 3, dtype=torch.float64),
        w2=torch.stack([torch.cat([one * e, zero]) for e in range(3)]),
        shared_gate_proj=None,
        shared_up_proj=None,
        shared_down_proj=None,
        shared_gate=None,
        copied=False,
    )
    assert forward(spec, tensors, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.float64)[0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_target_builds_a_block_of_any_shape_on_the_same_storage(dtype: torch.dtype) -> None:
    tensors = weights(TALKER, dtype)
    block = ReferenceTarget().build(TALKER, tensors, prefix="mlp")
    assert block.get_parameter("spec_w13").data_ptr() == tensors.w13.data_ptr()
    x = tokens(TALKER, 12, dtype)
    wanted = forward(TALKER, tensors, x, torch.float64)
    # One rounding of the output, and sums of some hundred terms in float32 (which float64 blocks don't need).
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for shaped in (x, x[None], x.view(3, 4, -1), x.view(4, 3, -1).transpose(0, 1)):
        y = block(shaped)
        assert y.shape == shaped.shape
        assert y.dtype == dtype
        expected = wanted if shaped.is_contiguous() else wanted.view(4, 3, -1).transpose(0, 1).reshape(12, -1)
        assert relative(y.reshape(12, -1), expected) < tolerance
    assert block(x[:0][None]).shape == (1, 0, TALKER.hidden)


def test_the_target_refuses_what_it_can_not_compute() -> None:
    target = ReferenceTarget()
    assert target.accepts(TALKER, Context("cpu", "bfloat16")) is None
    refusal = target.accepts(TALKER, Context("cpu", "float8_e4m3fn"))
    assert refusal is not None
    assert "float8_e4m3fn" in refusal.reason
    many = target.accepts(replace(TALKER, router=replace(TALKER.router, top_k=17)), Context("cpu", "float32"))
    assert many is not None
    assert "top-17 of 16" in many.reason
    odd = target.accepts(replace(TALKER, router=replace(TALKER.router, num_experts=8)), Context("cpu", "float32"))
    assert odd is not None
    assert "8 experts, but there are 16" in odd.reason


@pytest.mark.parametrize("together", [1, 2, 3, 16])
@pytest.mark.parametrize("biased", [False, True])
def test_some_matrices_at_once_give_what_each_gives(biased: bool, together: int) -> None:
    """On a GPU experts are multiplied some at a time, those that are visited."""
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 0, 7, 0, 0, 2, 5]
    rows, matrices = (torch.randn(*shape, generator=generator).double() for shape in ((18, 8), (8, 6, 8)))
    biases = torch.randn(8, 6, generator=generator).double() if biased else None
    wanted = [
        torch.nn.functional.linear(part, matrices[place], None if biases is None else biases[place])
        for place, part in enumerate(rows.split(counts))
    ]
    torch.testing.assert_close(_products(rows, counts, matrices, None, biases, together), torch.cat(wanted))
