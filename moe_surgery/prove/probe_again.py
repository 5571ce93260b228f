"""More probes for experts that a router was steered to by tokens of which can't be told what else they choose.

Such tokens aren't asked. With many experts there is hardly a block in which no expert loses its own so; what remains
gives it a weight next to nothing, beside which no answer tells whether it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import UNIT, Probes, towards, unit
from moe_surgery.prove.routing import Routing, route
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors

_FAINT = 0.1
"""An expert is seen faintly whose largest share of a token's weights is less than this, of the median expert's."""
_SIDES, _PUSHES = 4, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_MOST = 64
"""Experts that are looked after; where more are seen faintly, it isn't by chance."""


def steered_again(spec: MoESpec, tensors: BlockTensors, probes: Probes, routing: Routing, seed: int) -> Probes | None:
    """``probes``, and unit tokens that show the experts which these show faintly by their ``routing``.

    For a router that follows its logits. None where no expert is seen faintly, or no token was found for any.
    """
    shares = _shares(spec, probes, routing)
    best = shares.amax(0)[: spec.experts.acting]
    enough = _FAINT * float(best.median())
    faint = (best < enough).nonzero().flatten()
    if not 0 < len(faint) <= _MOST:
        return None
    generator = torch.Generator("cpu").manual_seed(seed + 2)
    weight = tensors.router.detach().to("cpu", torch.float64)
    ways = towards(weight)[faint.cpu()].repeat_interleave(_SIDES, 0)
    sides = unit(torch.randn(ways.shape, generator=generator, dtype=torch.float64, device="cpu"))
    candidates = torch.stack([unit(sides + push * ways) for push in _PUSHES], dim=1).to(probes.x)
    tried = Probes(candidates.flatten(0, 1), torch.full_like(candidates[..., 0].flatten(), UNIT).to(probes.family))
    ways_tried = route(spec, tensors, tried)
    shown = _shares(spec, tried, ways_tried) * ways_tried.decidable[:, None]
    experts = faint.repeat_interleave(_SIDES * len(_PUSHES))
    mine = shown.gather(1, experts[:, None]).view(len(faint), -1)
    # The least that is enough, so that the token's other experts stay visible; else the most there is.
    found = mine.where(mine >= enough, 2.0 - mine).argmin(1)
    index = torch.arange(len(faint), device=found.device)
    found = (index * mine.shape[1] + found)[mine[index, found] > best[faint]]
    if len(found) == 0:
        return None
    return Probes(torch.cat([probes.x, tried.x[found]]), torch.cat([probes.family, tried.family[found]]))


def _shares(spec: MoESpec, probes: Probes, routing: Routing) -> Tensor:
    """What part of each unit token's weights every expert surely has [N, E]; 0 for tokens of other families."""
    k = spec.router.top_k
    order = routing.order[:, :k]
    scores = routing.scores.gather(1, order).abs()
    parts = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    surely = torch.arange(k, device=order.device) < routing.sure[:, None]
    parts = parts * (surely & (probes.family == UNIT)[:, None])
    return torch.zeros_like(routing.scores).scatter(1, order, parts)
