"""The proof accepts right blocks and rejects wrong ones: every mutant as a real module, and misconduct of all kinds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from proof_blocks import DTYPES, ROUTED_MISTAKES, SHARED_MISTAKES, TALKER, THINKER, PlainBlock, judge, reference, wrong
from spec_weights import weights
from test_reference import omni_block, specs
from torch import Tensor

from moe_surgery.prove.proof import FEWEST_MUTANTS, prove, prove_reading
from moe_surgery.prove.verdict import Verdict
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec

# The published talker's proportions, smaller: many experts, each of them a small part of the output.
MANY = MoESpec(
    hidden=96,
    router=RouterSpec(num_experts=64, top_k=6, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=64, width=32, activation="silu"),
    shared=replace(TALKER.shared, width=64) if TALKER.shared else None,
)


MISTAKES = ROUTED_MISTAKES | SHARED_MISTAKES
SPECS = {"talker": TALKER, "thinker": THINKER, "many experts": MANY}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_transformers_blocks_are_accepted(shared: bool, renormalize: bool, dtype: torch.dtype) -> None:
    block, spec, tensors = omni_block(shared, renormalize, dtype)
    verdict = prove(block, reference(spec, tensors), spec, tensors)
    assert verdict.passed, verdict.reason
    assert verdict.margin >= 5
    assert verdict.build_error is not None
    assert max(verdict.reading_error, verdict.build_error) < 4 * verdict.noise
    assert len(verdict.mutants) >= FEWEST_MUTANTS
    assert "mutants" in verdict.reason
    # Half-precision rounding is what makes the noise, not a constant: it follows the dtype.
    assert 0.25 < verdict.noise / max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) < 16


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_implementation_is_accepted(spec: MoESpec, dtype: torch.dtype) -> None:
    verdict = judge(PlainBlock, spec, dtype)
    assert verdict.passed, verdict.reason


# Densely computed in bfloat16, the block of many experts is slow; test_what_cosine_does_not_see_is_rejected has it.
WRONG = [
    pytest.param(mistake, spec, dtype, id=f"{mistake}-{name}-{str(dtype).removeprefix('torch.')}")
    for mistake in MISTAKES
    for name, spec in SPECS.items()
    for dtype in DTYPES
    if (spec.shared or mistake in ROUTED_MISTAKES) and not (spec is MANY and dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("mistake", "spec", "dtype"), WRONG)
def test_wrong_blocks_are_rejected(mistake: str, spec: MoESpec, dtype: torch.dtype) -> None:
    verdict = judge(MISTAKES[mistake], spec, dtype)
    assert not verdict.passed
    assert "the new block is not what the spec says" in verdict.reason
    assert verdict.build_error is not None
    assert verdict.reading_error < 4 * verdict.noise


@pytest.mark.parametrize("mistake", ["one expert zeroed", "top-k less one", "top-k plus one"])
def test_what_cosine_does_not_see_is_rejected(mistake: str) -> None:
    tensors = weights(MANY)
    x = torch.randn(200, MANY.hidden, generator=torch.Generator().manual_seed(1))
    right, other = PlainBlock(MANY, tensors)(x), ROUTED_MISTAKES[mistake](MANY, tensors)(x)
    assert F.cosine_similarity(right.flatten(), other.flatten(), dim=0) > 0.97
    for dtype in DTYPES:
        assert not judge(ROUTED_MISTAKES[mistake], MANY, dtype).passed


# Weights whose first probe nearly cancels: alone, where torch adds in another order, it is five times as far off.
CANCELLING = MoESpec(
    hidden=16,
    router=RouterSpec(num_experts=2, top_k=1, scoring="softmax", renormalize=False),
    experts=ExpertsSpec(num_experts=2, width=8, activation="gelu"),
    shared=None,
)


@settings(max_examples=30, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**16))
@example(spec=CANCELLING, seed=2)
def test_any_right_block_is_accepted_in_float32(spec: MoESpec, seed: int) -> None:
    tensors = weights(spec, seed=seed)
    verdict = prove(PlainBlock(spec, tensors), reference(spec, tensors), spec, tensors, seed=seed)
    assert len(verdict.mutants) >= FEWEST_MUTANTS
    # Random weights of so small a block may leave an expert out of reach or its relu dead, and the verdict says so.
    assume("no probe is surely routed" not in verdict.reason)
    assume("exchanged" not in verdict.reason)
    assert verdict.passed, verdict.reason


@settings(max_examples=40, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**16), mistake=st.sampled_from(list(MISTAKES)))
def test_any_wrong_block_is_rejected(spec: MoESpec, seed: int, mistake: str) -> None:
    router, k, experts = spec.router, spec.router.top_k, spec.router.num_experts
    shared = spec.shared
    assume(mistake not in SHARED_MISTAKES or shared is not None)
    one_weight = k == 1 and router.renormalize
    # The same function, whatever the weights.
    alike = {
        "another activation": spec.experts.activation.startswith("gelu"),
        "renormalising or not": k == experts and router.scoring == "softmax",
        "top-k less one": k == 1,
        "top-k plus one": k == experts,
        "ranks shifted": k == experts,
        "lowest scores": k == experts,
        "one expert zeroed": experts < 4,
        "sigmoid scores": router.scoring == "sigmoid" or one_weight,
        "uniform weights": k == 1 and not router.renormalize and router.scale == 1.0,
        "weights in reverse": k == 1,
        "weights on the inputs": one_weight and router.scale == 1.0,
        "shared with another activation": shared is not None and shared.activation.startswith("gelu"),
        "shared ungated": shared is not None and shared.gate is None,
        "shared gate without its sigmoid": shared is not None and shared.gate is None,
    }
    assume(not alike.get(mistake, False))
    tensors = weights(spec, seed=seed)
    verdict = prove(PlainBlock(spec, tensors), MISTAKES[mistake](spec, tensors), spec, tensors, seed=seed)
    assert not verdict.passed
    assert "the new block is not what the spec says" in verdict.reason or "no probe is surely" in verdict.reason


MISREADINGS: dict[str, dict[str, Any]] = {
    "top-k": {"router": replace(TALKER.router, top_k=3)},
    "renormalising": {"router": replace(TALKER.router, renormalize=False)},
    "scale": {"router": replace(TALKER.router, scale=1.5)},
    "scoring": {"router": replace(TALKER.router, scoring="sigmoid")},
    "activation": {"experts": replace(TALKER.experts, activation="gelu")},
    "shared gate": {"shared": replace(TALKER.shared, gate=None) if TALKER.shared else None},
    "shared scale": {"shared": replace(TALKER.shared, scale=0.5) if TALKER.shared else None},
    "shared activation": {"shared": replace(TALKER.shared, activation="gelu_tanh") if TALKER.shared else None},
    "no shared expert": {"shared": None},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("misreading", MISREADINGS)
def test_a_wrong_reading_is_told_from_a_wrong_build(misreading: str, dtype: torch.dtype) -> None:
    tensors = weights(TALKER, dtype)
    misread = replace(TALKER, **MISREADINGS[misreading])
    if misreading == "shared gate":
        tensors = replace(tensors, shared_gate=None)
    old = PlainBlock(TALKER, weights(TALKER, dtype))
    verdict = prove(old, reference(misread, tensors), misread, tensors)
    assert not verdict.passed
    assert "the old block is not what was read" in verdict.reason
    assert "the new block" not in verdict.reason
    alone = prove_reading(old, misread, tensors)
    assert not alone.passed
    assert alone.build_error is None


def test_the_reading_can_be_proven_alone() -> None:
    tensors = weights(TALKER)
    verdict = prove_reading(PlainBlock(TALKER, tensors), TALKER, tensors)
    assert verdict.passed, verdict.reason
    assert {verdict.build_error, *(family.build_error for family in verdict.families)} == {None}


def changed(spec: MoESpec, **entries: Any) -> Verdict:
    """The verdict on a right block whose weights are changed in place first."""
    tensors = weights(spec)
    for name, change in entries.items():
        change(getattr(tensors, name))
    return prove(PlainBlock(spec, tensors), reference(spec, tensors), spec, tensors)


def test_weights_that_hide_a_mistake_fail_the_proof() -> None:
    silent = changed(TALKER, shared_down_proj=lambda weight: weight.zero_())
    assert not silent.passed
    assert "no power" in silent.reason
    assert "shared expert dropped" in {mutant.name for mutant in silent.mutants if mutant.distance == 0}

    def twin(weight: Tensor) -> None:
        weight[3] = weight[7]

    twins = changed(THINKER, w13=twin, w2=twin)
    assert not twins.passed
    assert "exchanged with its nearest” (0 away)" in twins.reason

    dead = changed(THINKER, w2=lambda weight: weight[3].zero_())
    assert not dead.passed
    assert "“expert 3 zeroed” (0 away)" in dead.reason


def test_experts_out_of_reach_fail_the_proof() -> None:
    def copy_row(weight: Tensor) -> None:
        weight[3] = weight[7]

    one = replace(THINKER, router=replace(THINKER.router, top_k=1))
    verdict = changed(one, router=copy_row)
    assert not verdict.passed
    assert "no probe is surely routed to experts 3, 7" in verdict.reason

    def inside(weight: Tensor) -> None:
        weight[3] = (weight[0] + weight[1]) / 2

    hidden = changed(one, router=inside)
    assert not hidden.passed
    assert "no probe is surely routed to expert 3" in hidden.reason


def test_a_router_without_a_preference_fails_the_proof() -> None:
    verdict = changed(THINKER, router=lambda weight: weight.zero_())
    assert not verdict.passed
    assert "any choice of experts is right" in verdict.reason


@pytest.mark.parametrize("name", ["router", "w13", "w2", "shared_up_proj"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_fail_the_proof(name: str, value: float) -> None:
    verdict = changed(TALKER, **{name: lambda weight: weight[2].fill_(value)})
    assert not verdict.passed
    assert f"the weights in {name} are not all finite" in verdict.reason


def test_weights_too_large_for_the_dtype_fail_the_proof() -> None:
    tensors = weights(THINKER, torch.float16)
    tensors.w2.mul_(60_000)
    verdict = prove(PlainBlock(THINKER, tensors), reference(THINKER, tensors), THINKER, tensors)
    assert not verdict.passed
    assert "too large" in verdict.reason or "aren't finite" in verdict.reason


EDGES = [
    replace(spec, router=replace(spec.router, top_k=k, renormalize=renormalize))
    for spec in (TALKER, THINKER)
    for k in (1, 16)
    for renormalize in (True, False)
]


@pytest.mark.parametrize("spec", EDGES, ids=lambda spec: spec.sentence())
def test_ten_mutants_remain_at_the_edges(spec: MoESpec) -> None:
    verdict = judge(PlainBlock, spec)
    assert verdict.passed, verdict.reason
    assert len({mutant.name for mutant in verdict.mutants}) == len(verdict.mutants) >= FEWEST_MUTANTS
    if spec.router.top_k == 16:
        # There is no other choice, and a softmax over all experts sums to 1 whether renormalised or not.
        assert verdict.near_ties == 0
        assert not any("renormalised" in mutant.name or "plus one" in mutant.name for mutant in verdict.mutants)


def test_one_expert_is_too_little_to_prove() -> None:
    spec = MoESpec(32, RouterSpec(1, 1, "softmax", True), ExpertsSpec(1, 16, "silu"), None)
    verdict = judge(PlainBlock, spec)
    assert not verdict.passed
    assert "mutants apply" in verdict.reason


def test_a_near_tie_may_go_either_way_and_is_counted() -> None:
    def worse(self: PlainBlock, x: Tensor) -> Tensor:
        # Another right way to round: the sum in two halves, each rounded to the dtype.
        half = x.shape[-1] // 2
        return x[:, :half] @ self.t.router[:, :half].T + x[:, half:] @ self.t.router[:, half:].T

    verdict = judge(wrong(logits=worse), TALKER, torch.bfloat16)
    assert verdict.passed, verdict.reason
    assert 0 < verdict.routing_flips <= verdict.near_ties


def test_the_verdict_is_deterministic_json_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    first = judge(PlainBlock, TALKER)
    assert torch.equal(torch.rand(4), wanted)
    assert first == judge(PlainBlock, TALKER)
    data = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert data["passed"] is True
    assert data["families"][0]["name"] == "unit"
    assert first.nearest_mutant is not None
    assert math.isclose(data["margin"], first.nearest_mutant.margin)
    broken = judge(wrong(forward=lambda self, x: PlainBlock.forward(self, x) / 0), TALKER)
    assert json.loads(json.dumps(broken.to_json(), allow_nan=False))["build_error"] is None


def test_no_gradients_and_no_autocast_get_into_the_proof() -> None:
    tensors = weights(TALKER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verdict = prove(PlainBlock(TALKER, tensors), reference(TALKER, tensors), TALKER, tensors)
    # The noise is that of float32, so that the blocks' own bfloat16 arithmetic shows.
    assert verdict.noise < 1e-5
    assert not verdict.passed
