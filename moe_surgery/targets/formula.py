"""The formulas of :mod:`moe_surgery.spec` in plain torch: activations, scores, the choice of experts, their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.spec import Activation, Groups, Mix, RouterSpec, Scoring

Mixer = Callable[[Tensor, Tensor], Tensor]
"""What stands between an MLP's matrices: ``(gate, up) -> input of down``, all of one shape."""


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
}


def mixer(mix: Mix) -> Mixer:
    """The function that ``mix`` says; where nothing is gated, ``up`` isn't used."""
    plain, limit = ACTIVATIONS[mix.activation], mix.limit

    def act(gate: Tensor) -> Tensor:
        return gate * torch.sigmoid(mix.alpha * gate) if mix.alpha != 1.0 else plain(gate)

    def mixed(gate: Tensor, up: Tensor) -> Tensor:
        if limit is not None and not mix.limit_after:
            gate = gate.clamp(max=limit)
        gate = act(gate)
        if limit is not None and mix.limit_after:
            gate = gate.clamp(max=limit)
        if not mix.gated:
            return gate
        if limit is not None:
            up = up.clamp(min=-limit, max=limit)
        return gate * (up + mix.offset if mix.offset else up)

    return mixed


def capped(router: RouterSpec, logits: Tensor) -> Tensor:
    """The logits under the router's soft cap."""
    if router.soft_cap is None:
        return logits
    return torch.tanh(logits / router.soft_cap) * router.soft_cap


def score(scoring: Scoring, logits: Tensor) -> Tensor:
    """Scores [T, E] of logits that are capped already, in their dtype."""
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()


def ranked(router: RouterSpec, scores: Tensor, correction: Tensor | None) -> Tensor:
    """What experts are ranked by [T, E]: their scores, corrected, in the best groups."""
    if correction is not None:
        scores = scores + correction.to(scores.dtype)
    return scores if router.groups is None else _grouped(router.groups, scores)


def _grouped(groups: Groups, scores: Tensor) -> Tensor:
    by_group = scores.unflatten(-1, (groups.count, -1))
    best = by_group.topk(2, -1).values.sum(-1) if groups.score == "top2" else by_group.amax(-1)
    chosen = best.topk(groups.chosen, -1).indices
    inside = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    return by_group.masked_fill(~inside[..., None], groups.outside).flatten(-2)


def weighted(router: RouterSpec, scores: Tensor, ids: Tensor) -> Tensor:
    """Weights [T, k] of the chosen experts ``ids`` [T, k], renormalised and scaled."""
    weights = scores.gather(-1, ids)
    if router.renormalize:
        total = (
            weights.norm(p=router.norm, dim=-1, keepdim=True) if router.norm != 1.0 else weights.sum(-1, keepdim=True)
        )
        if router.epsilon:
            total = total + router.epsilon
        if router.floor:
            total = total.clamp(min=router.floor)
        weights = weights / total
    return weights * router.scale if router.scale != 1.0 else weights
