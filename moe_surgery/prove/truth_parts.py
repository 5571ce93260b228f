"""The truth taken apart, and the mutants that are its own parts put together wrongly: no matrix product is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moe_surgery.prove.probe import Probes
from moe_surgery.prove.routing import Routing
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.formula import EXACT
from moe_surgery.targets.reference import applied_weights, entering, routing_weights, scores_of, weighted_sum, whole
from moe_surgery.targets.shared_expert import shared_output
from moe_surgery.weights.tensors import BlockTensors

F64 = torch.float64
# A bias or epsilon below this changes weights, which are of the order of one, by less than rounding in half precision.
_VISIBLE = 0.05


@dataclass(frozen=True, eq=False)
class Parts:
    """The truth taken apart, in float64: N tokens, D = min(k+1, E) ranks.

    ``outputs`` [N, D, H] unweighted, by rank; ``shared`` [N, H] ungated and ``gate`` [N, 1] its logit, or None.
    """

    spec: MoESpec
    tensors: BlockTensors
    probes: Probes
    routing: Routing
    outputs: Tensor
    shared: Tensor | None
    gate: Tensor | None

    @cached_property
    def ids(self) -> Tensor:
        return self.routing.order[:, : self.spec.router.top_k]

    @cached_property
    def weights(self) -> Tensor:
        return applied_weights(self.spec, self.routing.scores, self.ids)

    @cached_property
    def routed(self) -> Tensor:
        return weighted_sum(self.outputs, self.weights, F64)

    @cached_property
    def shared_sum(self) -> Tensor:
        """The shared expert's share of the output [N, H], with the output's bias; zeros where there is none."""
        shared = torch.zeros_like(self.outputs[:, 0])
        if self.shared is not None:
            shared = shared_output(self.spec, self.shared, self.gate)
        return shared if self.tensors.output_bias is None else shared + self.tensors.output_bias.to(F64)

    def output(self, routed: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The output [M, H] of ``tokens`` [M], or all, whose routed experts come to ``routed`` [M, H]."""
        tokens = torch.arange(len(self.ids), device=self.ids.device) if tokens is None else tokens
        return whole(self.tensors, self.probes.x[tokens], routed + self.shared_sum[tokens], F64)


def recombined(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Mutants made of the truth's own parts."""
    spec, routing, ids, weights = parts.spec, parts.routing, parts.ids, parts.weights
    k, experts, scale = spec.router.top_k, spec.router.num_experts, spec.router.scale
    routed, shared = parts.routed, parts.shared_sum

    def weighted(ids: Tensor, scores: Tensor = routing.scores, first: int = 0) -> Tensor:
        chosen = routing_weights(spec, scores, ids)
        if spec.experts.weights_on == "input":  # the outputs have the right weights in them
            chosen = torch.ones_like(chosen) if scores is routing.scores else chosen
        return parts.output(weighted_sum(parts.outputs[:, first:], chosen, F64))

    def reweighted(weights: Tensor) -> Tensor:
        return parts.output(weighted_sum(parts.outputs, weights, F64))

    yield "routed experts dropped", parts.output(torch.zeros_like(routed))
    if spec.own_rest:  # a norm makes the same of twice as much
        yield "routed experts negated", parts.output(-routed)
    else:
        yield "routed experts doubled", parts.output(2 * routed)
    yield "tokens shifted by one", parts.output(routed).roll(1, 0)
    # What else the model's own router might have done isn't known; it is taken as it is, and not on trial.
    own, on_output = spec.router.own, spec.experts.weights_on == "output"
    # A softmax over all experts sums to 1 already.
    if on_output and not (own or (k == experts and spec.router.scoring == "softmax" and not spec.router.epsilon)):
        raw = routing.scores.gather(1, ids)
        if spec.router.renormalize:
            yield "not renormalised", reweighted(raw * scale)
        else:
            yield "renormalised", reweighted(raw / raw.sum(-1, keepdim=True) * scale)
    if not (own or (k == 1 and spec.router.renormalize)):  # a single renormalised weight is 1 whatever the score
        softmax = spec.router.scoring == "softmax"
        other = routing.logits.sigmoid() if softmax else routing.logits.softmax(-1)
        yield f"{'sigmoid for softmax' if softmax else 'softmax for ' + spec.router.scoring}", weighted(ids, other)
        yield from _rescored(parts, reweighted)
    if own and k == 1 and on_output and spec.router.renormalize:
        yield "routing weights halved", reweighted(weights / 2)
    elif own and k == 1 and on_output:
        yield "routing weights left out", reweighted(torch.ones_like(weights))
        yield "routing weights applied twice", reweighted(weights.square())
    if k > 1 and own and on_output:  # of those that it gives a weight
        last = torch.arange(k, device=ids.device) == routing.sure[:, None] - 1
        yield "top-k less one", reweighted(weights.masked_fill(last, 0.0))
    elif k > 1:
        yield "top-k less one", weighted(ids[:, :-1])
    if k > 1 and on_output:
        yield "uniform routing weights", reweighted(weights.mean(-1, keepdim=True).expand_as(weights))
        yield "routing weights in reverse order", reweighted(weights.flip(-1))
    if k < experts and not own and spec.router.groups is None:
        yield "top-k plus one", weighted(routing.order[:, : k + 1])
        yield "ranks shifted by one", weighted(routing.order[:, 1 : k + 1], first=1)
    if scale != 1.0 and on_output:
        yield "routed scale dropped", parts.output(routed / scale)
    yield from _without(parts)
    if spec.shared is None:
        return
    assert parts.shared is not None
    yield "shared expert dropped", routed
    yield "shared expert doubled", routed + 2 * shared
    if parts.gate is not None:
        yield "shared expert ungated", routed + spec.shared.scale * parts.shared
    if spec.shared.scale != 1.0:
        yield "shared scale dropped", routed + shared / spec.shared.scale
    if scale != 1.0:
        yield "routed scale on the shared expert too", routed + scale * shared


def _rescored(parts: Parts, reweighted: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Mutants that weight the right experts by other scores."""
    spec, routing, tensors = parts.spec, parts.routing, parts.tensors
    bias = tensors.correction_bias

    def by(scores: Tensor, router: RouterSpec = spec.router) -> Tensor:
        return reweighted(routing_weights(replace(spec, router=router), scores, parts.ids))

    if spec.experts.weights_on == "input":
        return
    if bias is not None and float(bias.abs().max()) > _VISIBLE:
        yield "correction bias in the weights", by(routing.scores + bias.to(F64))
    if tensors.router_bias is not None and float(tensors.router_bias.abs().max()) > _VISIBLE:
        yield "router bias left out", by(scores_of(spec, routing.logits - tensors.router_bias.to(F64), EXACT))
    if spec.router.soft_cap is not None:
        uncapped = replace(spec, router=replace(spec.router, soft_cap=None))
        yield "soft cap left out", by(scores_of(uncapped, routing.logits, EXACT))
    if spec.router.epsilon > _VISIBLE:
        yield "epsilon left out", by(routing.scores, replace(spec.router, epsilon=0.0))


def _without(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Mutants that leave out a bias, or what stands for an expert."""
    spec, tensors, routed = parts.spec, parts.tensors, parts.routed
    real = parts.ids < spec.experts.num_experts
    if tensors.w2_bias is not None and bool(tensors.w2_bias.any()):  # not all missing
        biases = tensors.w2_bias.to(F64)[parts.ids.clamp_max(spec.experts.num_experts - 1)]
        yield "down biases left out", parts.output(routed - weighted_sum(biases, parts.weights * real, F64))
    if tensors.output_bias is not None:
        yield "output bias left out", parts.output(routed) - tensors.output_bias.to(F64)
    if spec.experts.empty:
        entered = entering(tensors, parts.probes.x, F64)
        absent = parts.weights.where(parts.ids >= spec.experts.acting, 0.0).sum(-1, keepdim=True)
        if bool(absent.any()):  # else nothing is added whatever they return
            yield "ids for no routed expert return their input", parts.output(routed + absent * entered)
    if spec.experts.identities:
        yield "identity experts left out", parts.output(weighted_sum(parts.outputs, parts.weights * real, F64))
