"""Probes for experts that a router's correction bias or groups keep from being chosen by their logits alone."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import LARGE, UNIT, Probes, towards, unit
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import router_scores, unrounded
from moe_surgery.weights.tensors import BlockTensors

# Scales of the tokens that are looked among, and each one's family.
_SIZES = ((1.0, UNIT), (8.0, LARGE), (64.0, LARGE))
_STARTS, _STEPS, _STRIDE = 4, 150, 0.1


def reach(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Probes:
    """``probes`` with tokens added that choose those experts which none of them does, as far as such are found."""
    starts = probes.x[probes.of(UNIT)][:_STARTS].to(torch.float64)
    for size, family in _SIZES:
        missing = _missing(spec, tensors, probes)
        if not len(missing):
            break
        x = _climb(spec, tensors, starts, missing, size).to(probes.x.dtype)
        found = (_choices(spec, tensors, x) == missing.repeat_interleave(len(starts))[:, None]).any(-1)
        families = torch.full_like(found[found], family, dtype=probes.family.dtype)
        probes = Probes(torch.cat([probes.x, x[found]]), torch.cat([probes.family, families]))
    return probes


def _climb(spec: MoESpec, tensors: BlockTensors, starts: Tensor, experts: Tensor, size: float) -> Tensor:
    """Tokens [M * n, H] of scale ``size`` that went from each start the way in which each of the experts [M] rises."""
    weight = tensors.router.detach().to(torch.float64)
    x = unit(starts + 4 * towards(weight)[experts][:, None]).flatten(0, 1) * size
    targets = experts.repeat_interleave(len(starts))[:, None]
    rivals = min(spec.router.top_k, spec.router.num_experts - 1)
    best, lead = x, torch.full_like(x[:, 0], -torch.inf)
    with torch.inference_mode(False), torch.enable_grad():
        bias = None if tensors.router_bias is None else tensors.router_bias.detach().clone()
        for _ in range(_STEPS):
            x = x.detach().requires_grad_()
            _, scores = router_scores(spec, weight, x, torch.float64, None, bias)
            if tensors.correction_bias is not None:
                scores = scores + tensors.correction_bias.detach().to(torch.float64)
            others = scores.scatter(-1, targets, -torch.inf)
            now = scores.gather(-1, targets).squeeze(-1) - others.topk(rivals, -1).values[:, -1]
            better = now > lead
            best, lead = torch.where(better[:, None], x, best).detach(), torch.where(better, now, lead).detach()
            (slope,) = torch.autograd.grad((now - 0.05 * others.topk(rivals, -1).values.sum(-1)).sum(), x)
            x = unit(x.detach() / size + _STRIDE * unit(slope)) * size
    return best


def unreachable(spec: MoESpec, tensors: BlockTensors) -> frozenset[int]:
    """Experts that no input chooses: the correction biases of ``k`` others exceed theirs by more than scores can.

    Scores of softmax and sigmoid lie between 0 and 1.
    """
    bias, router = tensors.correction_bias, spec.router
    if bias is None or router.groups is not None or router.scoring not in ("softmax", "sigmoid"):
        return frozenset()
    values = bias.detach().to("cpu", torch.float64)
    above = (values[None, :] - values[:, None] > 1.0).sum(-1)
    return frozenset((above >= router.top_k).nonzero().flatten().tolist())


def _choices(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    logits, scores = router_scores(spec, tensors.router, x, torch.float64, tensors.routing, tensors.router_bias)
    return unrounded(spec, logits, scores, tensors).topk(spec.router.top_k, -1).indices


def _missing(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Tensor:
    """The experts that no unit or large probe chooses."""
    some = torch.cat([probes.of(UNIT), probes.of(LARGE)])
    visits = torch.bincount(_choices(spec, tensors, probes.x[some]).flatten(), minlength=spec.router.num_experts)
    return (visits == 0).nonzero().flatten()
