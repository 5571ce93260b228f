"""What a block ranks is what its replacement ranks, and the proof tells when it isn't."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from proof_blocks import DTYPES, TALKER, PlainBlock, reference
from spec_weights import weights
from torch import Tensor

from moe_surgery.prove.probe import SATURATED, make_probes
from moe_surgery.prove.proof import prove
from moe_surgery.prove.routing import route
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.base import Context
from moe_surgery.targets.folded.target import FoldedTarget
from moe_surgery.targets.reference import chosen, forward
from moe_surgery.targets.routing import Routing

SIGMOID = replace(TALKER, router=RouterSpec(16, 4, "sigmoid", renormalize=True))
BY_LOGITS = replace(SIGMOID, router=replace(SIGMOID.router, ranks="logits", ranked_dtype="native"))


class ByLogits(PlainBlock):
    """Ranks its logits and weights by their scores."""

    def choose(self, scores: Tensor) -> Tensor:
        return scores.topk(self.spec.router.top_k, -1).indices  # of equal logits the same as other top-ks

    def routed(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        ids = self.choose(logits)
        weights = self.weigh(self.scores(logits).gather(1, ids)).to(x.dtype)
        return self.combine(self.experts(x).take_along_dim(ids[..., None], 1), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_that_ranks_logits_is_told_from_one_that_ranks_scores(dtype: torch.dtype) -> None:
    tensors = weights(BY_LOGITS, dtype)
    by_logits, by_scores = ByLogits(BY_LOGITS, tensors), PlainBlock(BY_LOGITS, tensors)
    right = prove(by_logits, reference(BY_LOGITS, tensors), BY_LOGITS, tensors)
    assert right.passed, right.reason
    assert "ranked by its saturated scores" in {mutant.name for mutant in right.mutants}
    wrong = prove(by_logits, by_scores, BY_LOGITS, tensors)
    assert not wrong.passed
    assert "the new block is not what the spec says" in wrong.reason
    assert "at a saturated token" in wrong.reason


def test_what_saturates_is_a_tie_only_where_it_is_ranked() -> None:
    tensors = weights(SIGMOID)
    probes = make_probes(SIGMOID, tensors.router, seed=0)
    large = probes.keep(probes.family == SATURATED)
    x = large.x[
        chosen(BY_LOGITS, tensors, large.x)
        .sort(-1)
        .values.ne(chosen(SIGMOID, tensors, large.x).sort(-1).values)
        .any(-1)
    ]
    assert len(x) > 0
    some = replace(large, x=x, family=torch.full_like(large.family[: len(x)], SATURATED))
    by_logits, by_scores = route(BY_LOGITS, tensors, some), route(SIGMOID, tensors, some)
    assert bool(by_logits.decidable.all()) and by_logits.near_ties == 0
    assert bool(((by_scores.choices() > 1) | ~by_scores.decidable).all())


def test_half_precision_ranking_of_a_float32_router_is_noticed() -> None:
    spec = replace(TALKER, router=replace(TALKER.router, logits_dtype="float32"))
    tensors = weights(spec, torch.bfloat16)

    class Wide(PlainBlock):
        def logits(self, x: Tensor) -> Tensor:
            return x.float() @ self.t.router.float().T

    class Rounded(Wide):
        def choose(self, scores: Tensor) -> Tensor:
            return super().choose(scores.bfloat16())

    right = prove(Wide(spec, tensors), Wide(spec, tensors), spec, tensors)
    assert right.passed, right.reason
    assert "ranked in bfloat16" in {mutant.name for mutant in right.mutants}
    assert (
        "the new block is not what the spec says"
        in prove(Wide(spec, tensors), Rounded(spec, tensors), spec, tensors).reason
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("wide", ["native", "float32"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_every_target_ranks_as_the_block_does(scoring: str, wide: str, dtype: torch.dtype) -> None:
    """The block written out in torch, its choices compared one by one at logits up to some hundred."""
    score = {"softmax": lambda it: it.softmax(-1), "sigmoid": torch.sigmoid}.get(
        scoring, lambda it: torch.nn.functional.softplus(it).sqrt()
    )
    logits = (torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    kept = logits.float() if wide == "float32" else logits
    for ranks, expected in (("logits", logits.topk(4, -1).indices), ("scores", score(kept).topk(4, -1).indices)):
        router = RouterSpec(
            16, 4, scoring, False, ranks=ranks, scores_dtype=wide, ranked_dtype="native" if ranks == "logits" else wide
        )
        weights_, ids = Routing(router, dtype)(logits, logits, 4, False)
        assert torch.equal(ids.long(), expected)
        torch.testing.assert_close(weights_, score(kept).gather(1, expected).to(dtype).float())
        eye = replace(weights(SIGMOID, dtype), router=torch.eye(16, dtype=dtype))
        assert torch.equal(chosen(replace(SIGMOID, router=router), eye, logits), expected)


def test_the_reference_chooses_in_the_blocks_arithmetic_and_the_truth_without_rounding() -> None:
    tensors = weights(BY_LOGITS, torch.bfloat16)
    x = torch.randn(200, BY_LOGITS.hidden, generator=torch.Generator().manual_seed(3)).bfloat16() * 20
    block = ByLogits(BY_LOGITS, tensors)
    with torch.no_grad():
        wanted = block(x).double()
        far = (reference(BY_LOGITS, tensors)(x).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(far.max()) < 0.05
    truth = forward(BY_LOGITS, tensors, x, torch.float64)
    assert torch.equal(truth, forward(SIGMOID, tensors, x, torch.float64))  # unrounded, they are the same


def test_the_folded_kernels_leave_to_torch_what_they_rank_finer() -> None:
    def left(spec: MoESpec, dtype: str = "bfloat16") -> str | None:
        assert FoldedTarget().accepts(spec, Context("cuda", dtype, live=False)) is None
        return FoldedTarget().remark(spec, Context("cuda", dtype, live=False))

    def but(**router: object) -> MoESpec:
        return replace(SIGMOID, router=replace(SIGMOID.router, **router))

    assert left(BY_LOGITS) is left(SIGMOID) is None
    assert left(but(ranks="logits", scores_dtype="native")) is None  # those are weights only
    for wrong in ({"scores_dtype": "native"}, {"ranked_dtype": "native"}):
        name = f"router.{next(iter(wrong))}"
        said = f"in part by torch: {name} = native is nothing that the folded kernels compute"
        assert left(but(**wrong)) == said
        assert left(but(**wrong), "float32") is None
    assert left(but(ranks="logits", logits_dtype="float32", ranked_dtype="native")) is not None


def test_a_plan_from_before_is_the_same_plan() -> None:
    data = SIGMOID.to_json()
    assert not {"ranks", "ranked_dtype", "cap_dtype"} & set(data["router"])
    assert MoESpec.from_json(data) == SIGMOID
    later = BY_LOGITS.to_json()
    assert (later["router"]["ranks"], later["router"]["ranked_dtype"]) == ("logits", "native")
    assert MoESpec.from_json(later) == BY_LOGITS
    assert "sigmoid top-4 of 16 by logits" in BY_LOGITS.sentence()
    assert BY_LOGITS.router.ranking() == "logits in the block's dtype"
