"""Probes for experts of a router that is the model's own: what it does is only known by asking, so many are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import ONE, UNIT, Probes, towards, unit
from moe_surgery.prove.routing import route
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import forward, router_scores, whole
from moe_surgery.weights.tensors import BlockTensors

_RANDOM = 1024
_PUSHES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_SIDES, _ROUNDS = 4, 3
# Tokens for each expert that are asked whether they choose it for sure.
_TRIED = 32
# Several, as a token may turn out to lie too near another choice in other company.
_TOKENS, _FEWEST = 4, 2
# Tokens on which it is looked how much of a block's output is its routed experts', and how much is enough.
_FEW, _ENOUGH = 16, 0.5
_SCALES = (1.0, 1 / 4, 1 / 16, 1 / 64, 4.0)


def try_out(spec: MoESpec, tensors: BlockTensors, probes: Probes, seed: int) -> Probes:
    """``probes``, and unit tokens that are surely routed to each expert that few of them are, if any are found.

    Tokens are tried in the block's dtype: at random, and pushed from several sides, by several lengths, towards where a
    missing expert's logit is higher than others', and where all others' are low. Of those that choose it many are asked
    whether rounding would have them choose otherwise: where a router rounds scores, most lie too near another choice.
    """
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    router = tensors.router.detach().to("cpu", torch.float64)
    for _ in range(_ROUNDS):
        mine = probes.keep(probes.family == UNIT)
        sure = _surely(spec, tensors, mine)[:, : spec.experts.acting]  # what adds nothing needs no tokens
        missing = (sure.sum(0) < _FEWEST).nonzero().flatten().cpu()
        if len(missing) == 0:
            break
        candidates = _pushed(router, missing, generator).to(probes.x.dtype).to(probes.x.device)
        chosen = _chosen(spec, tensors, candidates)
        some = torch.cat([chosen[:, expert].nonzero().flatten()[-_TRIED:] for expert in missing.tolist()]).unique()
        if len(some) == 0:  # some of vLLM's kernels fail when they are given no token
            continue
        tried = Probes(candidates[some], torch.full_like(some, UNIT, dtype=probes.family.dtype))
        sure = _surely(spec, tensors, tried)
        found = torch.cat([sure[:, expert].nonzero().flatten()[-_TOKENS:] for expert in missing.tolist()]).unique()
        probes = Probes(torch.cat([probes.x, tried.x[found]]), torch.cat([probes.family, tried.family[found]]))
    return _weighed(spec, tensors, probes, router, generator)


def _weighed(
    spec: MoESpec, tensors: BlockTensors, probes: Probes, router: Tensor, generator: torch.Generator
) -> Probes:
    """``probes``, and random tokens with weights other than 1 where few of the probes have any, if some are found.

    Some routers give most tokens' experts a weight of 1 (Phi-3.5-MoE), which is left out or misplaced unseen.
    """
    mine = probes.keep(probes.family == UNIT)
    if int(_between(spec, tensors, mine).sum()) >= _TOKENS:
        return probes
    candidates = unit(torch.randn(_RANDOM, router.shape[1], generator=generator, dtype=torch.float64, device="cpu"))
    candidates = candidates.to(probes.x.dtype).to(probes.x.device)
    tried = Probes(candidates, torch.full_like(candidates[:, 0], UNIT).to(probes.family.dtype))
    tried = tried.keep(_between(spec, tensors, tried))
    if len(tried.x) == 0:
        return probes
    tried = tried.keep(_surely(spec, tensors, tried).any(-1))
    return Probes(torch.cat([probes.x, tried.x[:_TRIED]]), torch.cat([probes.family, tried.family[:_TRIED]]))


def _between(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Tensor:
    """Which tokens [N] have a weight that is neither 0 nor about 1."""
    _, scores = router_scores(spec, tensors.router, probes.x, None, tensors.routing, tensors.router_bias)
    return ((scores != 0) & ((scores - 1).abs() > ONE)).any(-1)


def _pushed(router: Tensor, experts: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [n, H] of unit scale: some at random, and some that these experts' logits are high for."""

    def random(count: int) -> Tensor:
        return unit(torch.randn(count, router.shape[1], generator=generator, dtype=torch.float64, device="cpu"))

    sides = [random(len(experts)) for _ in range(_SIDES)]
    ways = [push * way for way in (towards(router)[experts], _alone(router, experts)) for push in _PUSHES]
    return torch.cat([random(_RANDOM), *(unit(side + way) for way in ways for side in sides)])


def _alone(router: Tensor, experts: Tensor) -> Tensor:
    """The directions [n, H] in which each expert's logit rises and all others' fall alike, or come nearest to that."""
    wanted = 2 * torch.eye(len(router), dtype=router.dtype, device=router.device)[:, experts] - 1
    products = router @ router.T
    products.diagonal().add_(products.diagonal().mean() * 1e-6)  # routers of more experts than columns have no inverse
    return unit(torch.linalg.solve(products, wanted).T @ router)


def turned_up(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Probes:
    """``probes`` of the scale at which a good part of the output comes of the routed experts, or the best there is.

    Beside a residual, what experts make of a normed input is lost in half precision unless the input is small.
    """
    some = probes.x[probes.of(UNIT)[:_FEW]]

    def share(scale: float) -> float:
        x = some * scale
        y = forward(spec, tensors, x, None).double()
        rest = whole(tensors, x, x.new_zeros(len(x), spec.inner), None).double()
        found = (y - rest).norm(dim=-1) / y.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        return float(found.nan_to_num(0.0).median())

    shares: dict[float, float] = {}
    for scale in _SCALES:
        shares[scale] = share(scale)
        if shares[scale] >= _ENOUGH:
            break
    best = max(shares, key=lambda scale: shares[scale])
    return probes if best == 1.0 else Probes(probes.x * best, probes.family)


def _surely(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Tensor:
    """Which experts [N, E] tokens choose, whatever rounding does; none, where it does something."""
    return _chosen(spec, tensors, probes.x) & route(spec, tensors, probes).decidable[:, None]


def _chosen(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    """Which experts [N, E] the model's own router gives a weight."""
    _, scores = router_scores(spec, tensors.router, x, None, tensors.routing, tensors.router_bias)
    return scores != 0
