"""Tokens for experts that steering by the router's weight didn't reach.

Steering assumes that an expert with a high logit is chosen. A router of the model's own may add a bias, or choose
groups first; what it does is only known by asking. So many tokens are tried, and those kept that visit experts which
the probes don't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import UNIT, Probes, pushed, random_unit
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import router_scores
from moe_surgery.weights.tensors import BlockTensors

_RANDOM = 1024
_PUSHES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Several, as a token may turn out to lie too near another choice.
_TOKENS = 4


def reach(spec: MoESpec, tensors: BlockTensors, probes: Probes, seed: int) -> Probes:
    """``probes``, and for every expert that none of their unit tokens is routed to some that are, where any is found.

    Tokens are tried in the block's dtype: at random, and pushed towards each missing expert's row by several lengths.
    """
    missing = _unvisited(spec, tensors, probes.x[probes.family == UNIT])
    if len(missing) == 0:
        return probes
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    weight = tensors.router.detach().to("cpu", torch.float64)
    at_random = random_unit(_RANDOM, spec.hidden, generator)
    start = random_unit(len(missing), spec.hidden, generator)
    tried = [at_random, *(pushed(weight, missing, start, push) for push in _PUSHES)]
    candidates = torch.cat(tried).to(probes.x.dtype).to(probes.x.device)
    chosen = _chosen(spec, tensors, candidates)
    found = [chosen[:, expert].nonzero().flatten()[-_TOKENS:] for expert in missing.tolist()]
    more = candidates[torch.cat(found).unique()]
    return Probes(
        torch.cat([probes.x, more]),
        torch.cat([probes.family, torch.full_like(probes.family[:1], UNIT).expand(len(more))]),
    )


def _unvisited(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    return (~_chosen(spec, tensors, x).any(0)).nonzero().flatten().cpu()


def _chosen(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    """Which experts [N, E] the model's own router gives a weight."""
    _, scores = router_scores(spec, tensors.router, x, None, tensors.routing)
    return scores != 0
