"""Probes for experts of a router that is the model's own: what it does is only known by asking, so many are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import UNIT, Probes, towards, unit
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import forward, router_scores, whole
from moe_surgery.weights.tensors import BlockTensors

_RANDOM = 1024
_PUSHES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Several, as a token may turn out to lie too near another choice.
_TOKENS = 4
# Tokens on which it is looked how much of a block's output is its routed experts', and how much is enough.
_FEW, _ENOUGH = 16, 0.5
_SCALES = (1.0, 1 / 4, 1 / 16, 1 / 64, 4.0)


def try_out(spec: MoESpec, tensors: BlockTensors, probes: Probes, seed: int) -> Probes:
    """``probes``, and for every expert that none of their unit tokens is routed to some that are, where any is found.

    Tokens are tried in the block's dtype: at random, and pushed towards each missing expert's row by several lengths.
    """
    missing = (~_chosen(spec, tensors, probes.x[probes.of(UNIT)]).any(0)).nonzero().flatten().cpu()
    if len(missing) == 0:
        return probes
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    directions = towards(tensors.router.detach().to("cpu", torch.float64))[missing]

    def random(count: int) -> Tensor:
        return unit(torch.randn(count, spec.hidden, generator=generator, dtype=torch.float64, device="cpu"))

    start = random(len(missing))
    tried = torch.cat([random(_RANDOM), *(unit(start + push * directions) for push in _PUSHES)])
    candidates = tried.to(probes.x.dtype).to(probes.x.device)
    chosen = _chosen(spec, tensors, candidates)
    found = torch.cat([chosen[:, expert].nonzero().flatten()[-_TOKENS:] for expert in missing.tolist()]).unique()
    families = torch.full_like(found, UNIT, dtype=probes.family.dtype)
    return Probes(torch.cat([probes.x, candidates[found]]), torch.cat([probes.family, families]))


def turned_up(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Probes:
    """``probes`` of the scale at which a good part of the output comes of the routed experts, or the best there is.

    Beside a residual, what experts make of a normed input is lost in half precision unless the input is small.
    """
    some = probes.x[probes.of(UNIT)[:_FEW]]

    def share(scale: float) -> float:
        x = some * scale
        y = forward(spec, tensors, x, None).double()
        rest = whole(tensors, x, torch.zeros_like(x), None).double()
        found = (y - rest).norm(dim=-1) / y.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        return float(found.nan_to_num(0.0).median())

    shares: dict[float, float] = {}
    for scale in _SCALES:
        shares[scale] = share(scale)
        if shares[scale] >= _ENOUGH:
            break
    best = max(shares, key=lambda scale: shares[scale])
    return probes if best == 1.0 else Probes(probes.x * best, probes.family)


def _chosen(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    """Which experts [N, E] the model's own router gives a weight."""
    _, scores = router_scores(spec, tensors.router, x, None, tensors.routing, tensors.router_bias)
    return scores != 0
