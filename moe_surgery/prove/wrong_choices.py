"""Mutants that choose other experts: ranked without bias or groups, by what isn't ranked, or in another dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_surgery.prove.probe import ZERO, Probes
from moe_surgery.prove.routing import Routing
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.formula import EXACT, Arithmetic, capped, ranked
from moe_surgery.targets.reference import scores_of
from moe_surgery.weights.tensors import BlockTensors

# Tokens for each.
_FEW = 8


def chosen_otherwise(
    spec: MoESpec, tensors: BlockTensors, probes: Probes, routing: Routing
) -> dict[str, tuple[Tensor, Tensor]]:
    """Wrong choices of experts: by name, the tokens [M] that they differ at and what these choose [M, k].

    A correction bias that is the same for all experts, among whom nothing else is told apart, changes no choice. Where
    no token shows what a block ranks, the choice is the right one: a check that can't tell has failed.
    """
    router, bias, found = spec.router, tensors.correction_bias, {}
    owed = _ranked_otherwise(spec, probes, routing)
    others = dict(owed)
    if bias is not None and (router.groups is not None or bool((bias != bias.flatten()[0]).any())):
        others["correction bias left out"] = _ranks(router, routing, None)
    if router.groups is not None:
        others["groups ignored"] = _ranks(replace(router, groups=None), routing, bias)
    mine = routing.order[:, : router.top_k].sort(-1).values
    clear = (routing.choices() == 1) & (probes.family != ZERO)
    for name, ranks in others.items():
        ids = ranks.topk(router.top_k, -1).indices
        differ = (ids.sort(-1).values != mine).any(-1) & clear
        tokens = differ.nonzero().flatten()[:_FEW]
        if not len(tokens) and name in owed:
            tokens, ids = clear.nonzero().flatten()[:1], mine
        if len(tokens):
            found[name] = tokens, ids[tokens]
    return found


def _ranks(router: RouterSpec, routing: Routing, correction: Tensor | None) -> Tensor:
    return ranked(router, capped(router, routing.logits, EXACT), routing.scores, correction, EXACT)


def _ranked_otherwise(spec: MoESpec, probes: Probes, routing: Routing) -> dict[str, Tensor]:
    """Rankings [N, E] of what the block doesn't rank, where that may choose other experts.

    Experts that these tie are ranked the other way round: which of them a top-k takes is chance.
    """
    router, native = spec.router, probes.x.dtype
    found: dict[str, Tensor] = {}
    if router.own or router.top_k == router.num_experts:
        return found
    arithmetic = Arithmetic(native)
    if router.ranks == "logits" and router.saturates:
        scores = scores_of(spec, routing.logits.to(arithmetic.of(router.logits_dtype)), arithmetic)
        found["ranked by its saturated scores"] = _reversed_ties(scores, routing)
    half = torch.finfo(native).eps > torch.finfo(torch.float32).eps
    coarser = router.logits_dtype == "float32" or (router.ranks == "scores" and router.saturates)
    if half and coarser and router.ranked_dtype == "float32" and router.follows_logits:
        name = str(native).removeprefix("torch.")
        found[f"ranked in {name}"] = _reversed_ties(_ranks(router, routing, None).to(native), routing)
    return found


def _reversed_ties(ranks: Tensor, routing: Routing) -> Tensor:
    """A ranking [N, E] of ``ranks`` in which the lower of two logits is the higher of a tie."""
    lowest_first = routing.logits.argsort(dim=-1, stable=True)
    order = lowest_first.gather(-1, ranks.gather(-1, lowest_first).argsort(dim=-1, descending=True, stable=True))
    places = torch.arange(order.shape[-1], 0, -1, device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places)
