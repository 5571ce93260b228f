"""Mutants: wrong twins of the block. If the check can't tell one from the truth, it proves nothing.

Mutants are made by putting the truth's own parts together wrongly, so most cost no matrix product. Those that need
new expert outputs ask for them beforehand (:func:`requests`) and get them for a few tokens only; a distance is the
maximum over tokens, so that fewer tokens can only understate it.

A mutant is left out only where the spec alone says that it computes the same function; each rule says why. A mutant
that the *weights* make equal to the truth stays in, and fails the proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_surgery.prove.metrics import Routing
from moe_surgery.prove.probe import LARGE, UNIT, Probes
from moe_surgery.spec import Activation, MoESpec
from moe_surgery.targets.reference import (
    Mix,
    Visits,
    gated,
    routing_weights,
    shared_output,
    shared_parts,
    weighted_sum,
)
from moe_surgery.weights.tensors import BlockTensors

F64 = torch.float64
# Tokens per family for mutants that need new matrix products.
_FEW = 8
# Tokens for each pair of experts that is exchanged.
_EXCHANGES = 3
# Entries of each weight that stand for an expert when looking for the one most like it.
_SKETCH = 1024


@dataclass(frozen=True, eq=False)
class Parts:
    """The truth taken apart, in float64: N tokens, D = min(k+1, E) ranks.

    ``outputs`` [N, D, H] unweighted, by rank; ``shared`` [N, H] ungated and ``gate`` [N, 1] its logit, or None.
    """

    spec: MoESpec
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
        return routing_weights(self.spec, self.routing.scores, self.ids)

    @cached_property
    def routed(self) -> Tensor:
        return weighted_sum(self.outputs, self.weights, F64)

    @cached_property
    def shared_sum(self) -> Tensor:
        """The shared expert's share of the output [N, H]; zeros where there is none."""
        if self.shared is None:
            return torch.zeros_like(self.outputs[:, 0])
        return shared_output(self.spec, self.shared, self.gate)


@dataclass(frozen=True, eq=False)
class Twin:
    """A mutant's outputs ``y`` [M, H] for ``tokens`` [M].

    ``case`` [M] numbers independent cases of the same mistake, such as the expert it was made in; the hardest one to
    see counts. ``name`` may have a ``{case}`` to fill in.
    """

    name: str
    y: Tensor
    tokens: Tensor
    case: Tensor | None = None


def few_tokens(probes: Probes) -> Tensor:
    """The tokens on which mutants that need new expert outputs are judged."""
    return torch.cat([probes.of(family)[:_FEW] for family in (UNIT, LARGE)])


def other_activation(activation: Activation) -> Activation:
    """An activation that a check should tell from this one. (gelu and its tanh form are too alike for bfloat16.)"""
    return "gelu" if activation == "silu" else "silu"


def first_share(mix: Mix, ranks: int) -> Mix:
    """What the first of ``ranks`` computes of a gated MLP that is cut along its width."""

    def share(gate: Tensor, up: Tensor) -> Tensor:
        mixed = mix(gate, up)
        return mixed * (torch.arange(mixed.shape[-1], device=mixed.device) < mixed.shape[-1] // ranks)

    return share


def siblings(tensors: BlockTensors, seed: int) -> Tensor:
    """For each expert the one whose weights are nearest to its own [E], judged by a sample of them."""
    experts = tensors.w13.shape[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    sample = []
    for weight in (tensors.w13, tensors.w2):
        rows, columns = (
            torch.randint(size, (_SKETCH,), generator=generator, device="cpu") for size in weight.shape[1:]
        )
        sample.append(weight[:, rows.to(weight.device), columns.to(weight.device)].to(F64))
    sketch = torch.cat(sample, 1)
    apart = torch.cdist(sketch, sketch)
    return (apart + torch.diag(apart.new_full((experts,), torch.inf))).argmin(1)


def requests(
    spec: MoESpec, tensors: BlockTensors, probes: Probes, routing: Routing, seed: int, ranks: int = 1
) -> dict[str, tuple[Tensor, Visits]]:
    """What the mutants need besides the truth's own parts: tokens and the visits to make for them, by mutant."""
    k, experts = spec.router.top_k, spec.router.num_experts
    ids = routing.order[:, :k]
    weights = routing_weights(spec, routing.scores, ids)
    few = few_tokens(probes)
    x, plain = probes.x[few].to(F64), gated(spec.experts.activation)
    wide = x.repeat_interleave(k, 0)

    def visit(chosen: Tensor, mix: Mix = plain, x: Tensor = wide) -> tuple[Tensor, Visits]:
        return few, Visits(x, chosen.flatten(), mix)

    act = spec.experts.activation
    wanted = {
        "gate and up swapped": visit(ids[few], lambda gate, up: plain(up, gate)),
        f"{other_activation(act)} for {act}": visit(ids[few], gated(other_activation(act))),
        "up projection left out": visit(ids[few], lambda gate, up: plain(gate, torch.ones_like(up))),
    }
    if ranks > 1:
        wanted["routed experts not reduced"] = visit(ids[few], first_share(plain, ranks))
    if experts > 1:
        wanted["router rows shifted by one expert"] = visit((ids[few] + 1) % experts)
        unit, others = probes.of(UNIT), siblings(tensors, seed)
        full = weights.new_zeros(len(unit), experts).scatter(1, ids[unit], weights[unit])
        count = min(_EXCHANGES, len(unit))
        # For each expert those unit tokens that choose it where exchanging it moves the most weight.
        moved = (full - full[:, others]).abs().where(full > 0, -1.0)
        tokens = unit[moved.topk(count, 0).indices].flatten()
        wanted["experts exchanged"] = tokens, Visits(probes.x[tokens].to(F64), others.repeat(count), plain)
    if k < experts and spec.router.scoring != "own":  # else there is no other choice
        wanted["lowest scores chosen"] = visit(routing.order[few][:, -k:])
    if not _one_weight(spec):  # else every weight is 1
        wanted["weights on the inputs"] = visit(ids[few], x=wide * weights[few].reshape(-1, 1))
    return wanted


def twins(
    parts: Parts,
    tensors: BlockTensors,
    wanted: dict[str, tuple[Tensor, Visits]],
    outputs: list[Tensor],
    ranks: int = 1,
) -> Iterator[Twin]:
    """Every mutant that applies to the spec; ``outputs`` are those of ``wanted``, in its order."""
    spec = parts.spec
    everyone = torch.arange(len(parts.ids), device=parts.ids.device)
    for name, y in _recombined(parts):
        yield Twin(name, y, everyone)
    if ranks > 1:
        yield Twin("reduced twice", ranks * (parts.routed + parts.shared_sum), everyone)
        if spec.shared is not None:
            yield Twin("shared expert reduced twice", parts.routed + ranks * parts.shared_sum, everyone)
    yield _zeroed(parts, everyone)
    few = few_tokens(parts.probes)
    for (name, (tokens, visits)), out in zip(wanted.items(), outputs, strict=True):
        if name == "experts exchanged":
            yield _exchanged(parts, tokens, visits.experts, out)
            continue
        weights = parts.weights[tokens]
        if name == "weights on the inputs":
            weights = torch.ones_like(weights)
        if name == "lowest scores chosen":
            ids = parts.routing.order[tokens][:, -spec.router.top_k :]
            weights = routing_weights(spec, parts.routing.scores[tokens], ids)
        routed = weighted_sum(out.view(*weights.shape, -1), weights, F64)
        yield Twin(name, routed + parts.shared_sum[tokens], tokens)
    if spec.shared is not None:
        act, plain = spec.shared.activation, gated(spec.shared.activation)
        mixes: dict[str, Mix] = {
            "shared gate and up swapped": lambda gate, up: plain(up, gate),
            f"shared {other_activation(act)} for {act}": gated(other_activation(act)),
        }
        if ranks > 1:
            mixes["shared expert not reduced"] = first_share(plain, ranks)
        for name, mix in mixes.items():
            out, gate = shared_parts(tensors, parts.probes.x[few], mix, F64)
            yield Twin(name, parts.routed[few] + shared_output(spec, out, gate), few)


def _recombined(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Mutants made of the truth's own parts."""
    spec, routing, ids, weights = parts.spec, parts.routing, parts.ids, parts.weights
    k, experts, scale = spec.router.top_k, spec.router.num_experts, spec.router.scale
    routed, shared = parts.routed, parts.shared_sum

    def weighted(ids: Tensor, scores: Tensor = routing.scores, first: int = 0) -> Tensor:
        chosen = routing_weights(spec, scores, ids)
        return weighted_sum(parts.outputs[:, first:], chosen, F64) + shared

    def reweighted(weights: Tensor) -> Tensor:
        return weighted_sum(parts.outputs, weights, F64) + shared

    yield "routed experts dropped", shared
    yield "routed experts doubled", 2 * routed + shared
    yield "tokens shifted by one", (routed + shared).roll(1, 0)
    # What else the model's own router might have done isn't known; it is taken as it is, and not on trial.
    own = spec.router.scoring == "own"
    # A softmax over all experts sums to 1 already.
    if not (own or (k == experts and spec.router.scoring == "softmax")):
        raw = routing.scores.gather(1, ids)
        if spec.router.renormalize:
            yield "not renormalised", reweighted(raw * scale)
        else:
            yield "renormalised", reweighted(raw / raw.sum(-1, keepdim=True) * scale)
    if not (own or (k == 1 and spec.router.renormalize)):  # a single renormalised weight is 1 whatever the score
        softmax = spec.router.scoring == "softmax"
        other = routing.logits.sigmoid() if softmax else routing.logits.softmax(-1)
        yield f"{'sigmoid for softmax' if softmax else 'softmax for sigmoid'}", weighted(ids, other)
    if k > 1:
        yield "top-k less one", weighted(ids[:, :-1])
        yield "uniform routing weights", reweighted(weights.mean(-1, keepdim=True).expand_as(weights))
        yield "routing weights in reverse order", reweighted(weights.flip(-1))
    if k < experts and not own:
        yield "top-k plus one", weighted(routing.order[:, : k + 1])
        yield "ranks shifted by one", weighted(routing.order[:, 1 : k + 1], first=1)
    if scale != 1.0:
        yield "routed scale dropped", routed / scale + shared
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


def _zeroed(parts: Parts, everyone: Tensor) -> Twin:
    """One expert zeroed, for every expert."""
    whole = parts.routed + parts.shared_sum
    ranks = range(parts.ids.shape[1])
    y = torch.cat([whole - parts.weights[:, j, None] * parts.outputs[:, j] for j in ranks])
    return Twin("expert {case} zeroed", y, everyone.repeat(len(ranks)), parts.ids.T.flatten())


def _exchanged(parts: Parts, tokens: Tensor, others: Tensor, out: Tensor) -> Twin:
    """Every expert exchanged with the one most like it, judged on a few tokens for each."""
    ids, weights, outputs = parts.ids[tokens], parts.weights[tokens], parts.outputs[tokens]
    experts = torch.arange(len(tokens), device=tokens.device) % parts.spec.router.num_experts
    mine, theirs = ids == experts[:, None], ids == others[:, None]
    own = weighted_sum(outputs, mine.to(F64), F64)
    mine_weight = (weights * mine).sum(-1, keepdim=True)
    theirs_weight = (weights * theirs).sum(-1, keepdim=True)
    moved = (mine_weight - theirs_weight).where(mine_weight > 0, 0.0)
    y = (parts.routed + parts.shared_sum)[tokens] + moved * (out - own)
    return Twin("expert {case} exchanged with its nearest", y, tokens, experts)


def _one_weight(spec: MoESpec) -> bool:
    """Is every routing weight 1, whatever the scores?"""
    return spec.router.renormalize and spec.router.top_k == 1 and spec.router.scale == 1.0
