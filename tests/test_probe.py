"""The probes reach every expert and come near ties; the metric knows which choices of experts are legitimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof_blocks import DTYPES, TALKER, THINKER
from spec_weights import weights

from moe_surgery.prove.ground import rehearse, survey
from moe_surgery.prove.metrics import Truth, luck, slack
from moe_surgery.prove.probe import FAMILIES, LARGE, SMALL, UNIT, ZERO, Probes, make_probes, saturated, unit
from moe_surgery.prove.probe_own_router import try_out
from moe_surgery.prove.routing import route
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec
from moe_surgery.weights.tensors import BlockTensors, OwnRouting


def probes_of(spec: MoESpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Probes:
    return make_probes(spec, weights(spec, dtype).router, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_families_have_their_scales(dtype: torch.dtype) -> None:
    probes = probes_of(TALKER, dtype)
    assert probes.x.dtype == dtype
    scale = probes.x.double().pow(2).mean(-1).sqrt()
    for family, wanted in ((UNIT, 1.0), (SMALL, 1 / 16), (LARGE, 8.0), (ZERO, 0.0)):
        assert len(probes.of(family))
        torch.testing.assert_close(
            scale[probes.of(family)], torch.full_like(scale[probes.of(family)], wanted), rtol=0.01, atol=0
        )
    assert len(probes.of(UNIT)) > 64
    assert torch.equal(probes.x, probes_of(TALKER, dtype).x)
    assert not torch.equal(probes.x, probes_of(TALKER, dtype, seed=1).x)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.sampled_from([2, 8, 24, 48]),
    k=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    spread=st.floats(0.0, 2.0),
    common=st.floats(0.0, 3.0),
)
def test_every_expert_is_reached_where_rows_are_independent(
    experts: int, k: int, dtype: torch.dtype, seed: int, spread: float, common: float
) -> None:
    """Rows of very different lengths, and with much in common: the popular experts don't hide the others."""
    hidden = 48
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(experts, hidden, generator=generator) * torch.linspace(-spread, spread, experts).exp()[:, None]
    router = ((rows + common * torch.randn(1, hidden, generator=generator)) / hidden**0.5).to(dtype)
    k = min(k, experts)
    spec = replace(THINKER, hidden=hidden, router=replace(THINKER.router, num_experts=experts, top_k=k))
    probes = make_probes(spec, router, seed)
    unit = probes.x[probes.of(UNIT)].double() @ router.double().T
    assert set(unit.topk(k, -1).indices.flatten().tolist()) == set(range(experts))


@pytest.mark.parametrize("alike", [False, True], ids=["independent rows", "two rows alike"])
def test_every_second_saturated_token_chooses_among_large_logits(alike: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    router, x = (torch.randn(size, 48, generator=generator, dtype=torch.float64) for size in (8, 6))
    if alike:
        router[5] = router[2]
    spec = replace(THINKER, hidden=48, router=replace(THINKER.router, num_experts=8, top_k=2))
    found = saturated(spec, router, unit(x))
    assert len(found) == 6
    third = (found @ router.T).topk(3, -1).values[:, -1]
    torch.testing.assert_close(third[1::2], 0.6 * third.new_tensor([10.0, 20.0, 40.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_tokens_are_near_ties_and_some_only_nearly(dtype: torch.dtype) -> None:
    tensors = weights(TALKER, dtype)
    probes = make_probes(TALKER, tensors.router, 0)
    routing = route(TALKER, tensors, probes)
    assert bool(routing.decidable.all())
    assert routing.near_ties >= 4
    k = TALKER.router.top_k
    ranked = routing.logits.gather(1, routing.order)
    gaps = ranked[:, k - 1] - ranked[:, k]
    tied = torch.bincount(routing.tokens, minlength=len(probes.x)) > 1
    clear = ~tied & (probes.family == UNIT)
    # A router that rounds a few bits worse than the dtype does would get the nearest of the clear ones wrong.
    assert float(gaps[tied & (probes.family == UNIT)].max()) < 0.2
    assert float(gaps[clear].min()) < 100 * torch.finfo(dtype).eps * float(ranked.abs().max())
    assert int(routing.sure[tied].max()) < k
    assert bool((routing.sure[~tied] == k).all())


def test_the_choices_of_a_tie_are_those_that_noise_allows() -> None:
    spec = replace(THINKER, hidden=4, router=replace(THINKER.router, num_experts=4, top_k=2, logits_dtype="float32"))
    router = torch.eye(4)
    x = torch.tensor([[4.0, 2.0, 2.0, 0.0], [4.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    tensors = replace(weights(spec, torch.float32), router=router)
    routing = route(spec, tensors, Probes(x, torch.tensor([UNIT, UNIT, UNIT, ZERO])))
    pairs = list(zip(routing.tokens.tolist(), routing.ids().tolist(), strict=True))
    choices = [{frozenset(ids) for owner, ids in pairs if owner == token} for token in range(4)]
    assert choices[0] == {frozenset({0, 1}), frozenset({0, 2})}
    assert choices[1] == {frozenset({0, 1})}
    assert len(choices[2]) == 6
    # Every output of the zero token is zero, whoever computes it.
    assert len(choices[3]) == 1
    assert routing.sure.tolist() == [1, 2, 0, 2]


def test_a_distance_is_that_of_the_worst_token_from_its_nearest_choice() -> None:
    outputs = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    truth = Truth(outputs, torch.tensor([0, 1, 2, 0]), torch.tensor([UNIT, UNIT, ZERO]))
    y = torch.tensor([[0.0, 2.2], [0.0, 10.5], [0.0, 0.0]])
    distance, other = truth.distance(y, torch.arange(3))
    torch.testing.assert_close(distance, torch.tensor([0.1, 0.05, 0.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert other.tolist() == [True, False, False]
    worst = truth.worst(distance, torch.arange(3))
    torch.testing.assert_close(worst, distance.new_tensor([0.1, 0.0, 0.0, 0.0, 0.0]), rtol=1e-6, atol=0)
    assert len(worst) == len(FAMILIES)
    y[1, 0] = torch.nan
    assert truth.distance(y, torch.arange(3))[0].isinf().tolist() == [False, True, False]
    # Anything but zero for a zero token counts, as a fraction of what the others return.
    y[2, 0] = 1e-3
    assert float(truth.distance(y, torch.arange(3))[0][2]) > 0.01


def test_longer_sums_may_be_further_off_only_where_they_are_kept_in_the_dtype() -> None:
    assert slack(256, torch.float32) == slack(64, torch.float32) == slack(4096, torch.bfloat16)
    assert slack(1024, torch.float32) == 2 * slack(256, torch.float32)


def test_few_roundings_are_luckier_than_many() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, allowed in ((8, 1.7), (384, 1.1)):
        assert luck(width) == pytest.approx(allowed, abs=0.02)
        # How many times the norm of as many roundings is another's: rarely more than a right block is allowed.
        norms = torch.rand(2, 100_000, width, generator=generator).sub(0.5).norm(dim=-1)
        assert float((norms[0] / norms[1] > luck(width)).float().mean()) < 0.05


def rounding_router(bias: torch.Tensor, k: int) -> OwnRouting:
    """As vLLM's grouped one: half of its choices lie within a rounding of others, and its biases keep experts back."""

    def routing(x: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.float().sigmoid().to(logits.dtype).float()
        groups = (scores + bias).view(len(x), 8, len(bias) // 8)
        assert len(x) > 0  # as some of vLLM's kernels need it
        inside = torch.zeros(len(x), 8, dtype=torch.bool).scatter(1, groups.topk(2, -1)[0].sum(-1).topk(4, -1)[1], True)
        ids = groups.masked_fill(~inside[:, :, None], -torch.inf).flatten(1).topk(k, -1)[1]
        return scores.gather(1, ids), ids

    return routing


def behind(bias: torch.Tensor) -> tuple[MoESpec, BlockTensors]:
    """A block of as many experts as there are biases, behind such a router."""
    spec = MoESpec(256, RouterSpec(len(bias), 4, "own", False), ExpertsSpec(len(bias), 16, "silu"), None)
    return spec, replace(weights(spec, torch.bfloat16), routing=rounding_router(bias, 4))


def test_experts_of_a_router_that_rounds_its_scores_are_surely_reached() -> None:
    spec, tensors = behind(0.2 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    probes = try_out(spec, tensors, make_probes(spec, tensors.router, 0), 0)
    routed = route(spec, tensors, probes)
    unit = (probes.family == UNIT) & routed.decidable
    assert len(routed.order[unit][:, :4].unique()) == 32
    again, reason = rehearse(spec, tensors, 0, make_probes(spec, tensors.router, 0))
    assert reason is None and torch.equal(again.x, probes.x)


def test_an_expert_that_a_models_own_router_never_chooses_is_told_before_its_block_is_built() -> None:
    bias = torch.zeros(32)
    bias[[3, 17]] = -2.0
    spec, tensors = behind(bias)
    _, reason = rehearse(spec, tensors, 0, make_probes(spec, tensors.router, 0))
    assert reason == "no probe is surely routed to experts 3, 17 (2 in all)"
    assert survey(spec, tensors, 0).unvisited == (3, 17)  # type: ignore[union-attr]


def test_of_many_experts_none_is_seen_faintly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 experts, some are steered to by tokens that can't be asked; others are found for them."""
    spec = MoESpec(1024, RouterSpec(512, 10, "softmax", renormalize=True), ExpertsSpec(512, 8, "silu"), None)
    tensors = weights(spec, torch.bfloat16, seed=3)

    def faintest() -> float:
        ground = survey(spec, tensors, 0)
        assert not isinstance(ground, str)
        order, scores = ground.routing.order[:, :10], ground.routing.scores
        shares = scores.gather(1, order) / scores.gather(1, order).sum(-1, keepdim=True)
        best = torch.zeros(512).double().scatter_reduce(0, order.flatten(), shares.flatten(), "amax")
        return float(best.min() / best.median())

    assert faintest() > 0.1
    monkeypatch.setattr("moe_surgery.prove.ground.steered_again", lambda *given: None)
    assert faintest() < 0.1
