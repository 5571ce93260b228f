"""What is known before a block is asked: the probes, their true outputs, the dtype's noise, and the mutants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.prove.asking import FEWEST, asked_alone
from moe_surgery.prove.metrics import Truth, luck, slack
from moe_surgery.prove.mutants import Twin, requests, twins
from moe_surgery.prove.probe import FAMILIES, LARGE, UNIT, Probes, make_probes
from moe_surgery.prove.probe_again import steered_again
from moe_surgery.prove.probe_own_router import try_out, turned_up
from moe_surgery.prove.probe_unreached import reach, unreachable
from moe_surgery.prove.routing import Routing, route
from moe_surgery.prove.truth_parts import F64, Parts
from moe_surgery.spec import MoESpec
from moe_surgery.targets.e4m3 import E4M3
from moe_surgery.targets.formula import mixer
from moe_surgery.targets.reference import (
    Visits,
    entering,
    expert_outputs,
    given,
    routed_sum,
    router_scores,
    visited,
    whole,
)
from moe_surgery.targets.shared_expert import shared_output, shared_parts
from moe_surgery.weights.tensors import BlockTensors


@dataclass(frozen=True, eq=False)
class Ground:
    """The ground that blocks are judged on.

    ``noise`` [families] is the error of plain torch in the block's own dtype, of tokens alone and in company, but no
    less than ``floor``; a right block may be ``slack`` times as far off. ``overflowed`` probes aren't finite in that
    dtype and ``undecided`` ones may be routed too many ways; both are left out. ``unvisited`` experts are chosen for
    sure by no probe.
    """

    probes: Probes
    routing: Routing
    truth: Truth
    noise: list[float]
    slack: float
    twins: tuple[Twin, ...]
    overflowed: int
    undecided: int
    unvisited: tuple[int, ...]

    @property
    def floor(self) -> float:
        """The least error that is worth telling from zero."""
        return _floor(self.probes)


def _floor(probes: Probes) -> float:
    """One rounding of the output in the block's dtype, or what float64 itself may be off by."""
    return max(torch.finfo(probes.x.dtype).eps / 2, 16 * torch.finfo(torch.float64).eps)


def _logits_noise(spec: MoESpec, probes: Probes, routing: Routing) -> Tensor:
    """What one rounding of a token's largest logit does to its weights, relative, the worst of each family.

    The finest dtype is counted that a block of this one keeps logits in. Where logits are large this is most of the
    noise, and plain torch may happen to round the few tokens that it is measured on better than that.
    """
    wide = torch.promote_types(probes.x.dtype, torch.float32)
    largest = routing.logits.abs().amax(-1)
    if spec.router.soft_cap is not None:
        largest = largest.clamp(max=spec.router.soft_cap)
    worst = largest.new_zeros(len(FAMILIES)).scatter_reduce(0, probes.family, largest, "amax")
    return worst * torch.finfo(wide).eps / 2


def survey(
    spec: MoESpec, tensors: BlockTensors, seed: int, ranks: int = 1, probes: Probes | None = None
) -> Ground | str:
    """Everything that needs no block, in one pass over the experts' weights; or why there is no ground to judge on.

    Where ``ranks`` share a block's work, partial sums that are put together wrongly are among the mutants. ``probes``
    are those that :func:`make_probes` made, where that was done before.
    """
    for name, weight in vars(tensors).items():
        if isinstance(weight, Tensor) and not _finite(weight):
            return f"the weights in {name} are not all finite, so no output can be compared"
    for name, scale in vars(tensors.scales).items() if tensors.scales is not None else ():
        if isinstance(scale, Tensor) and not _finite(scale):
            return f"the scales of {name} are not all finite, so no output can be compared"
    with torch.no_grad(), torch.autocast(tensors.router.device.type, enabled=False):
        if probes is None:
            probes = make_probes(spec, tensors.router, seed, tensors)
        return _survey(spec, tensors, seed, ranks, probes)


def _finite(weight: Tensor) -> bool:
    if weight.dtype == E4M3:  # the greatest magnitude in bits is NaN's, and there is no infinity
        return bool(((weight.view(torch.uint8) & 0x7F) != 0x7F).all())
    return all(bool(bound.isfinite()) for bound in weight.aminmax())  # isfinite() takes twenty times as long


def rehearse(spec: MoESpec, tensors: BlockTensors, seed: int, probes: Probes) -> tuple[Probes, str | None]:
    """The probes of a router that is the model's own, and why they can't prove a block, if they can't.

    That they route surely to each expert is known of the router alone, before a block is built: no expert's weights are
    needed.
    """
    with torch.no_grad(), torch.autocast(tensors.router.device.type, enabled=False):
        probes = try_out(spec, tensors, probes, seed)
        kept, routing = _decided(spec, tensors, probes)
        if len(kept.x) < FEWEST:
            return probes, f"all but {len(kept.x)} of {len(probes.x)} probes are within its router's rounding noise"
        unvisited = _unvisited(spec, tensors, kept, routing)
        return probes, f"no probe is surely routed to {listed(unvisited)}" if unvisited else None


def listed(experts: Sequence[int]) -> str:
    """Experts as a sentence names them."""
    if len(experts) == 1:
        return f"expert {experts[0]}"
    few = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
    return f"experts {few} ({len(experts)} in all)"


def _decided(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> tuple[Probes, Routing]:
    """Those probes of which it can be told what they choose, and what that is."""
    while not bool((routing := route(spec, tensors, probes)).decidable.all()):
        probes = probes.keep(routing.decidable)
    return probes, routing


def _survey(spec: MoESpec, tensors: BlockTensors, seed: int, ranks: int, probes: Probes) -> Ground | str:
    if spec.router.own:
        probes = try_out(spec, tensors, probes, seed)
        probes = turned_up(spec, tensors, probes) if spec.own_rest else probes
    elif not spec.router.follows_logits:
        probes = reach(spec, tensors, probes)
    asked = len(probes.x)
    probes, routing = _decided(spec, tensors, probes)
    more = steered_again(spec, tensors, probes, routing, seed) if spec.router.follows_logits else None
    if more is not None:
        asked += len(more.x) - len(probes.x)
        probes, routing = _decided(spec, tensors, more)
    undecided = asked - len(probes.x)
    if len(probes.of(UNIT)) == 0 and spec.router.own:
        return "its own router's choices are within its rounding noise, or name one expert twice, on every probe"
    if len(probes.of(UNIT)) == 0:
        return "the router's scores are within its own rounding noise on every probe, so any choice of experts is right"
    rounded = _evaluate(spec, tensors, probes, routing, None)
    finite = torch.ones_like(probes.family, dtype=torch.bool)
    finite[routing.tokens[~rounded.rows.isfinite().all(-1)]] = False
    noisy = rounded.rows[finite[routing.tokens]]
    probes, routing = probes.keep(finite), routing.keep(finite)
    if len(probes.of(UNIT)) == 0:
        return "no probe's output is finite in the block's dtype: the weights are too large for it"
    if (left := len(probes.x)) < FEWEST:
        overflowed = asked - undecided - left
        why = "have outputs that aren't finite" if overflowed > undecided else "are within the router's rounding noise"
        return f"all but {left} of {asked} probes {why}, and {FEWEST} are needed"
    wanted = requests(spec, tensors, probes, routing, seed, ranks)
    exact = _evaluate(spec, tensors, probes, routing, F64, [visits for _, visits in wanted.values()])
    truth = Truth(exact.rows, routing.tokens, probes.family)
    parts = Parts(spec, tensors, probes, routing, exact.outputs, exact.shared, exact.gate)
    # A near tie's noise is that of its noisiest legitimate choice.
    everyone = torch.arange(len(noisy), device=noisy.device)
    noise = truth.worst(truth.distance_from(noisy, everyone), routing.tokens)
    for token in asked_alone(probes):
        mask = torch.zeros_like(probes.family, dtype=torch.bool).index_fill(0, token, True)
        alone = _evaluate(spec, tensors, probes.keep(mask), routing.keep(mask), None)
        rows = mask[routing.tokens].nonzero().flatten()
        noise = noise.maximum(truth.worst(truth.distance_from(alone.rows, rows), routing.tokens[rows]))
    return Ground(
        probes=probes,
        routing=routing,
        truth=truth,
        noise=noise.maximum(_logits_noise(spec, probes, routing)).clamp_min(_floor(probes)).tolist(),
        slack=_slack(spec, probes.x.dtype),
        twins=tuple(twins(parts, tensors, wanted, exact.visited, ranks)),
        overflowed=asked - undecided - len(probes.x),
        undecided=undecided,
        unvisited=_unvisited(spec, tensors, probes, routing),
    )


def measured(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> tuple[Truth | None, Tensor, float]:
    """The truth of tokens ``x`` [T, H], which of them it knows [T], and how far a right block may be from it.

    Unknown are tokens whose choice of experts can't be told and those that overflow; with no other there is no truth.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        probes = Probes(x, torch.full((len(x),), UNIT, device=x.device))
        routing = route(spec, tensors, probes)
        kept = routing.decidable.clone()
        if not bool(kept.any()):
            return None, kept, 0.0
        probes, routing = probes.keep(kept), routing.keep(kept)
        exact = _evaluate(spec, tensors, probes, routing, F64)
        truth = Truth(exact.rows, routing.tokens, probes.family)
        rounded = _evaluate(spec, tensors, probes, routing, None).rows
        noise = truth.distance_from(rounded, torch.arange(len(rounded), device=x.device))
        noise = noise.where(noise.isfinite(), 0.0).max().clamp_min(_floor(probes))
        noise = noise.maximum(_logits_noise(spec, probes, routing)[UNIT])
        return truth, kept, float(noise) * _slack(spec, x.dtype)


def _slack(spec: MoESpec, dtype: torch.dtype) -> float:
    """How many times the noise a right block may be off."""
    return slack(max(spec.sizes), dtype) * luck(min(spec.sizes))


def _unvisited(spec: MoESpec, tensors: BlockTensors, probes: Probes, routing: Routing) -> tuple[int, ...]:
    """Experts that are in every legitimate choice of no unit or large token, though some input may choose them."""
    k = spec.router.top_k
    some = torch.cat([probes.of(UNIT), probes.of(LARGE)])
    sure = torch.arange(k, device=some.device) < routing.sure[some][:, None]
    visits = torch.bincount(routing.order[some, :k][sure], minlength=spec.router.num_experts)
    never = unreachable(spec, tensors)
    return tuple(n for n in (visits[: spec.experts.acting] == 0).nonzero().flatten().tolist() if n not in never)


@dataclass(frozen=True, eq=False)
class _Values:
    """One evaluation of the spec: ``rows`` [R, H] are the outputs of every legitimate choice, the rest its parts.

    ``outputs`` [N, D, H] by rank, ``shared`` [N, H] ungated, ``gate`` [N, 1]; ``visited`` what was asked for besides.
    """

    rows: Tensor
    outputs: Tensor
    shared: Tensor | None
    gate: Tensor | None
    visited: list[Tensor]


def _evaluate(
    spec: MoESpec,
    tensors: BlockTensors,
    probes: Probes,
    routing: Routing,
    dtype: torch.dtype | None,
    more: Sequence[Visits] = (),
) -> _Values:
    """Every legitimate output in ``dtype``, or in the block's own arithmetic, with the experts that the truth chose."""
    depth = min(spec.router.top_k + 1, spec.router.num_experts)
    x, plain = entering(tensors, probes.x, dtype), mixer(spec.experts.mix)
    _, scores = router_scores(spec, tensors.router, probes.x, dtype, tensors.routing, tensors.router_bias)
    base = Visits(_given(spec, x, scores, routing, depth), routing.order[:, :depth].flatten(), plain)
    # The other choices of near ties may need experts of a lower rank than depth.
    tokens, ranks, ids = routing.tokens, routing.ranks, routing.ids()
    deep = ranks >= depth
    extra = Visits(given(spec, x[tokens].repeat_interleave(deep.sum(-1), 0), ids[deep]), ids[deep], plain)
    flat, extras, *visited_ = expert_outputs(tensors, [base, extra, *more], dtype)
    outputs = flat.view(len(x), depth, -1)
    chosen = outputs[tokens[:, None], ranks.clamp_max(depth - 1)]
    chosen[deep] = extras
    rows = routed_sum(spec, scores[tokens], ids, chosen)
    shared, gate = None, None
    if spec.shared is not None:
        shared, gate = shared_parts(tensors, x, mixer(spec.shared.mix), dtype)
        rows = rows + shared_output(spec, shared, gate)[tokens]
    if tensors.output_bias is not None:
        rows = rows + tensors.output_bias.to(rows.dtype)
    rows = whole(tensors, probes.x[tokens], rows, dtype)
    return _Values(rows, outputs, shared, gate, visited_)


def _given(spec: MoESpec, x: Tensor, scores: Tensor, routing: Routing, depth: int) -> Tensor:
    """What the experts of the first ``depth`` ranks are given [N * depth, H]."""
    k, order = spec.router.top_k, routing.order
    mine = visited(spec, x, scores, order[:, :k]).view(len(x), k, -1)
    if depth == k:
        return mine.flatten(0, 1)
    return torch.cat([mine, visited(spec, x, scores, order[:, k : k + 1])[:, None]], 1).flatten(0, 1)
