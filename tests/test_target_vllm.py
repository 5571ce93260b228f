"""The vLLM target computes its spec, however it is called, and shares the weights it is given."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from spec_weights import tolerance, weights, worst
from vllm_blocks import DTYPES, SPEC, TARGET, build, tokens

from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets import reference
from moe_surgery.targets.routing import Routing
from moe_surgery.weights.tensors import BlockTensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


def clear_of_ties(spec: MoESpec, tensors: BlockTensors, x: torch.Tensor) -> torch.Tensor:
    """The tokens whose choice of experts no rounding of the logits can change."""
    if spec.router.top_k == spec.experts.num_experts:
        return x
    ranked = (x.double() @ tensors.router.double().T).sort(-1, descending=True).values
    gap = ranked[:, spec.router.top_k - 1] - ranked[:, spec.router.top_k]
    kept = x[gap > 8 * torch.finfo(x.dtype).eps * ranked.abs().amax()]
    assert len(kept) >= 16
    return kept


ROUTERS = {
    "softmax": SPEC.router,
    "softmax, not renormalised": replace(SPEC.router, renormalize=False),
    "softmax, scaled": replace(SPEC.router, scale=2.5),
    "softmax, not renormalised, scaled": replace(SPEC.router, renormalize=False, scale=0.5),
    "sigmoid": replace(SPEC.router, scoring="sigmoid"),
    "sigmoid, not renormalised": replace(SPEC.router, scoring="sigmoid", renormalize=False),
    "sigmoid, scaled": replace(SPEC.router, scoring="sigmoid", scale=2.5),
    "top-1": replace(SPEC.router, top_k=1),
    "top-1, not renormalised": replace(SPEC.router, top_k=1, renormalize=False),
    "all experts": replace(SPEC.router, top_k=8),
    "float32 router": replace(SPEC.router, logits_dtype="float32", weights_dtype="float32"),
}
SHARED = {
    "none": None,
    "ungated": replace(SPEC.shared, gate=None),
    "scaled": replace(SPEC.shared, scale=0.25),
    "relu": replace(SPEC.shared, activation="relu"),
    "gelu_tanh": replace(SPEC.shared, activation="gelu_tanh", gate=None, scale=3.0),
}
SPECS = {
    **{f"router: {name}": replace(SPEC, router=router) for name, router in ROUTERS.items()},
    **{f"shared: {name}": replace(SPEC, shared=shared) for name, shared in SHARED.items()},
    **{
        f"experts: {act} {width}": replace(SPEC, experts=replace(SPEC.experts, activation=act, width=width))
        for act, width in (("gelu", 48), ("gelu_tanh", 48), ("silu", 1), ("silu", 40), ("silu", 128))
    },
    "hidden 160": replace(SPEC, hidden=160),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_computes_its_spec(spec: MoESpec, dtype: torch.dtype) -> None:
    tensors = weights(spec, dtype)
    x = clear_of_ties(spec, tensors, tokens(spec, 64, dtype=dtype))
    block = TARGET.build(spec, tensors, prefix="mlp")
    with torch.no_grad():
        got = block(x)
    assert got.dtype == dtype
    assert worst(got, reference.forward(spec, tensors, x, torch.float64)) < tolerance(spec, dtype)


def test_activations_are_told_apart_by_the_tolerance() -> None:
    """The test above would pass with the wrong GELU if its tolerance were wider than their distance."""
    gelu, tanh = (SPECS[f"experts: {name} 48"] for name in ("gelu", "gelu_tanh"))
    x = tokens(gelu, 64)
    outputs = [reference.forward(spec, weights(spec), x, torch.float64) for spec in (gelu, tanh)]
    assert worst(outputs[0], outputs[1]) > 10 * tolerance(gelu, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_routing_weights_are_rounded_once(router: RouterSpec, dtype: torch.dtype) -> None:
    """Scores are float32 whatever the logits' dtype; the weights are rounded to it at the end, or not at all."""
    x = tokens(SPEC, 64).flatten()[: 64 * 8].view(64, 8).to(dtype)
    weights, ids = Routing(router, dtype)(x, x, router.top_k, router.renormalize)
    exact = x.double().softmax(-1) if router.scoring == "softmax" else x.double().sigmoid()
    wanted = exact.gather(-1, ids.long())
    assert torch.equal(wanted, exact.topk(router.top_k).values)
    if router.renormalize:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps / 2 if router.weights_dtype == "native" else 0.0
    arithmetic = 16 * torch.finfo(torch.float32).eps  # exp, a sum of eight, two divisions
    assert (weights / (wanted * router.scale) - 1).abs().max() <= rounding + arithmetic
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
def test_chooses_as_transformers_does_where_scores_tie(dtype: torch.dtype, renormalize: bool) -> None:
    """Every router row is there twice, so each choice of an odd number of experts ends in an exact tie."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    spec = replace(SPEC, router=replace(SPEC.router, top_k=3, renormalize=renormalize))
    config = configuration.Qwen3OmniMoeTalkerTextConfig(
        hidden_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        norm_topk_prob=renormalize,
        shared_expert_intermediate_size=96,
    )
    config._experts_implementation = "eager"
    tensors = weights(spec, dtype)
    tensors.router[4:] = tensors.router[:4]
    old = modeling.Qwen3OmniMoeTalkerTextSparseMoeBlock(config).to(dtype)
    new = TARGET.build(spec, tensors, prefix="mlp")
    x = tokens(spec, 4, 32, dtype=dtype)
    with torch.no_grad():
        old.gate.weight.copy_(tensors.router)
        old.experts.gate_up_proj.copy_(tensors.w13)
        old.experts.down_proj.copy_(tensors.w2)
        old.shared_expert.gate_proj.weight.copy_(tensors.shared_gate_proj)
        old.shared_expert.up_proj.weight.copy_(tensors.shared_up_proj)
        old.shared_expert.down_proj.weight.copy_(tensors.shared_down_proj)
        old.shared_expert_gate.weight.copy_(tensors.shared_gate)
        assert worst(new(x), old(x).double()) < 2 * tolerance(spec, dtype)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 2, 3), (0,), (2, 0)], ids=str)
def test_keeps_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    block, x = build(), tokens(SPEC, *shape)
    with torch.inference_mode():
        out = block(hidden_states=x)
        flat = block(x.reshape(-1, SPEC.hidden))
    assert out.shape == x.shape
    assert torch.equal(out, flat.view(out.shape))


def test_takes_strided_inputs_and_writes_to_none() -> None:
    block, wide = build(), tokens(SPEC, 6, 4, 2)
    strided = {
        "transposed": wide[:, :, 0].transpose(0, 1),
        "sliced": wide.flatten(2)[:, 0, : SPEC.hidden],
        "expanded": wide[:1, 0, 0].expand(5, SPEC.hidden),
    }
    for name, x in strided.items():
        before = x.clone()
        with torch.no_grad():
            out, plain = block(x), block(x.contiguous())
        assert not x.is_contiguous() and torch.equal(out, plain), name
        assert torch.equal(x, before) and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("width", [48, 64])
def test_weights_are_shared_or_counted(width: int) -> None:
    spec = replace(SPEC, experts=replace(SPEC.experts, width=width))
    tensors = weights(spec)
    before = {name: tensor.clone() for name, tensor in vars(tensors).items() if isinstance(tensor, torch.Tensor)}
    block = TARGET.build(spec, tensors, prefix="mlp")
    with torch.no_grad():
        block(tokens(spec, 4))
    for name, tensor in before.items():
        assert torch.equal(getattr(tensors, name), tensor), name
    shared = {parameter.data_ptr() for parameter in block.parameters()}
    for name in ("router", "shared_gate_proj", "shared_up_proj", "shared_down_proj", "shared_gate"):
        assert getattr(tensors, name).data_ptr() in shared, name
    moved = sum(tensor.nbytes for name, tensor in before.items() if name not in ("w13", "w2"))
    padded = -(-width // 32) * 32  # the CPU kernels pad the width to 32
    assert (block.new_bytes, block.moved_bytes) == (3 * 8 * padded * 64 * 4, moved)


def test_a_failed_forward_does_not_break_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = build(), tokens(SPEC, 3)
    experts = block.fused.runner.routed_experts

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        before = block(x)
        with monkeypatch.context() as patch:
            patch.setattr(experts, "forward_modular", interrupt)
            with pytest.raises(KeyboardInterrupt):
                block(x)
        assert torch.equal(block(x), before)
