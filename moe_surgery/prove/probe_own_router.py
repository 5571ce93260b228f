"""Probes for experts of a router that is the model's own: what it does is only known by asking, so many are tried."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import UNIT, Probes, towards, unit
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import router_scores
from moe_surgery.weights.tensors import BlockTensors

_RANDOM = 1024
_PUSHES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Several, as a token may turn out to lie too near another choice.
_TOKENS = 4


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


def _chosen(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    """Which experts [N, E] the model's own router gives a weight."""
    _, scores = router_scores(spec, tensors.router, x, None, tensors.routing, tensors.router_bias)
    return scores != 0
