"""The formulas of :mod:`moe_surgery.spec` in plain torch: activations, scores, the choice of experts, their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.spec import Activation, Groups, Mix, Precision, RouterSpec, Scoring

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
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
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


@dataclass(frozen=True)
class Arithmetic:
    """The dtypes that a router computes in: ``native`` is the block's own, ``wide`` what its spec calls float32."""

    native: torch.dtype
    wide: torch.dtype = torch.float32

    def of(self, precision: Precision) -> torch.dtype:
        return self.native if precision == "native" else self.wide


EXACT = Arithmetic(torch.float64, torch.float64)


def capped(router: RouterSpec, logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The logits under the router's soft cap, as they are ranked or scored."""
    if router.soft_cap is None:
        return logits
    return torch.tanh(logits.to(arithmetic.of(router.cap_dtype)) / router.soft_cap) * router.soft_cap


def scored(router: RouterSpec, logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Scores [T, E] of logits [T, E] that are capped already."""
    return score(router.scoring, logits.to(arithmetic.of(router.scores_dtype)))


def score(scoring: Scoring, logits: Tensor) -> Tensor:
    """Scores [T, E] of logits, in their dtype."""
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()


def ranked(
    router: RouterSpec, logits: Tensor, scores: Tensor, correction: Tensor | None, arithmetic: Arithmetic
) -> Tensor:
    """What experts are ranked by [T, E]: their capped logits or their scores, corrected, in the best groups.

    It is what the block ranks, rounded as the block rounds it: where that ties two experts, a top-k of it may choose
    either, and a top-k of anything finer or coarser may choose others.
    """
    values = logits if router.ranks == "logits" else scores
    if correction is not None:
        values = values + correction
    values = values.to(arithmetic.of(router.ranked_dtype))
    return values if router.groups is None else _grouped(router.groups, values)


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
