"""Mutants: wrong twins of the block. If the check can't tell one from the truth, it proves nothing.

Mutants are made by putting the truth's own parts together wrongly, so most cost no matrix product. Those that need
new expert outputs ask for them beforehand (:func:`requests`) and get them for a few tokens only; a distance is the
maximum over tokens, so that fewer tokens can only understate it.

A mutant is left out only where the spec alone says that it computes the same function, or where what it leaves out is
all zero (biases that only other projections have); each rule says why. Any other mutant that the *weights* make equal
to the truth stays in, and fails the proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.prove.probe import LARGE, ONE, UNIT, Probes
from moe_surgery.prove.routing import Routing
from moe_surgery.prove.truth_parts import F64, Parts, recombined
from moe_surgery.prove.wrong_choices import chosen_otherwise
from moe_surgery.spec import Activation, Mix, MoESpec
from moe_surgery.targets.formula import Mixer, mixer
from moe_surgery.targets.reference import (
    Visits,
    applied_weights,
    entering,
    given,
    routing_weights,
    visited,
    weighted_sum,
)
from moe_surgery.targets.shared_expert import shared_output, shared_parts
from moe_surgery.weights.tensors import BlockTensors

# Tokens per family for mutants that need new matrix products.
_FEW = 8
# Tokens for each pair of experts that is exchanged.
_EXCHANGES = 3
# Entries of each weight that stand for an expert when looking for the one most like it.
_SKETCH = 1024
# The share of projections that must reach a clamp before leaving it out is a mistake that shows.
_REACHED = 0.01


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
    large = probes.of(LARGE)
    return torch.cat([probes.of(UNIT)[:_FEW], large[:_FEW], large[_FEW:][-_FEW:]])


def telling_weights(probes: Probes, weights: Tensor, few: Tensor) -> Tensor:
    """Tokens on which it shows where routing weights [N, k] apply: the ``few``, or unit ones if theirs are all 1."""
    told = ((weights != 0) * (1 - weights).abs()).amax(-1)
    if bool((told[few] > ONE).any()):
        return few
    unit = probes.of(UNIT)
    return unit[told[unit].topk(min(_FEW, len(unit))).indices]


def other_activation(mix: Mix) -> Activation:
    """An activation that a check should tell from this one.

    gelu and its tanh form are too alike for bfloat16, and so are gelu and a silu whose α of 1.702 makes it so.
    """
    if mix.activation != "silu":
        return "silu"
    return "gelu" if mix.alpha == 1.0 else "relu"


def first_share(mix: Mixer, ranks: int) -> Mixer:
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
    x, mix = entering(tensors, probes.x[few], F64), spec.experts.mix
    plain, inputs = mixer(mix), visited(spec, x, routing.scores[few], ids[few])
    real = spec.experts.num_experts

    def visit(chosen: Tensor, mix: Mixer = plain, x: Tensor = inputs, tokens: Tensor = few) -> tuple[Tensor, Visits]:
        return tokens, Visits(x, chosen.flatten(), mix)

    wanted = {name: visit(ids[few], other) for name, other in mixed_otherwise(mix).items()}
    if not mix.gated and spec.router.own:  # of such blocks there is little else to do wrongly
        wanted["activation left out"] = visit(ids[few], lambda gate, up: gate)
    if not reached(spec, tensors, probes):
        wanted.pop("clamp left out", None)
    if ranks > 1:
        wanted["routed experts not reduced"] = visit(ids[few], first_share(plain, ranks))
    if experts > 1:
        shifted = (ids[few] + 1) % experts
        wanted["router rows shifted by one expert"] = visit(shifted, x=given(spec, inputs, shifted.flatten()))
    if real > 1:
        unit, others = torch.cat([probes.of(UNIT), probes.of(LARGE)]), siblings(tensors, seed)
        full = weights.new_zeros(len(unit), experts).scatter(1, ids[unit], weights[unit])[:, :real]
        count = min(_EXCHANGES, len(unit))
        # For each expert those unit tokens that choose it where exchanging it moves the most weight.
        moved = (full - full[:, others]).abs().where(full != 0, -1.0)
        chosen = moved.topk(count, 0).indices
        entered = entering(tensors, probes.x[unit[chosen.flatten()]], F64)
        if spec.experts.weights_on == "input":
            entered = entered * full.gather(0, chosen).reshape(-1, 1)
        wanted["experts exchanged"] = unit[chosen].flatten(), Visits(entered, others.repeat(count), plain)
    if k < experts and not spec.router.own:  # else there is no other choice
        lowest = routing.order[few][:, -k:]
        wanted["lowest scores chosen"] = visit(lowest, x=visited(spec, x, routing.scores[few], lowest))
    for name, (tokens, chosen) in chosen_otherwise(spec, tensors, probes, routing).items():
        entered = visited(spec, entering(tensors, probes.x[tokens], F64), routing.scores[tokens], chosen)
        wanted[name] = visit(chosen, x=entered, tokens=tokens)
    if not (_one_weight(spec) or _scales(spec)):
        some = telling_weights(probes, weights, few)
        raw = given(spec, entering(tensors, probes.x[some], F64).repeat_interleave(k, 0), ids[some].flatten())
        on_input = spec.experts.weights_on == "input"
        name = f"weights on the {'outputs' if on_input else 'inputs'}"
        wanted[name] = visit(ids[some], x=raw if on_input else raw * weights[some].reshape(-1, 1), tokens=some)
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
    for name, y in recombined(parts):
        yield Twin(name, y, everyone)
    if ranks > 1:
        yield Twin("reduced twice", ranks * (parts.routed + parts.shared_sum), everyone)
        if spec.shared is not None:
            yield Twin("shared expert reduced twice", parts.routed + ranks * parts.shared_sum, everyone)
    yield _zeroed(parts, everyone)
    few = few_tokens(parts.probes)
    others = chosen_otherwise(spec, tensors, parts.probes, parts.routing)
    for (name, (tokens, visits)), out in zip(wanted.items(), outputs, strict=True):
        if name == "experts exchanged":
            yield _exchanged(parts, tokens, visits.experts, out)
            continue
        weights = parts.weights[tokens]
        if name == "weights on the inputs":
            weights = torch.ones_like(weights)
        if name == "weights on the outputs":
            weights = routing_weights(spec, parts.routing.scores[tokens], parts.ids[tokens])
        ids = others[name][1] if name in others else parts.routing.order[tokens][:, -spec.router.top_k :]
        if name in others or name == "lowest scores chosen":
            weights = applied_weights(spec, parts.routing.scores[tokens], ids)
        routed = weighted_sum(out.view(*weights.shape, -1), weights, F64)
        yield Twin(name, parts.output(routed, tokens), tokens)
    if spec.shared is not None:
        mixes = {f"shared {name}": mix for name, mix in mixed_otherwise(spec.shared.mix).items()}
        mixes.pop("shared clamp left out", None)
        mixes.pop("shared up projection left out", None)
        if ranks > 1:
            mixes["shared expert not reduced"] = first_share(mixer(spec.shared.mix), ranks)
        bias = 0.0 if tensors.output_bias is None else tensors.output_bias.to(F64)
        for name, mix in mixes.items():
            out, gate = shared_parts(tensors, parts.probes.x[few], mix, F64)
            yield Twin(name, parts.routed[few] + shared_output(spec, out, gate) + bias, few)


def mixed_otherwise(mix: Mix) -> dict[str, Mixer]:
    """What may wrongly stand between an MLP's matrices, by name."""
    plain, act = mixer(mix), mix.activation
    other = other_activation(mix)
    found: dict[str, Mixer] = {f"{other} for {act}": mixer(replace(mix, activation=other, alpha=1.0))}
    if mix.gated:
        found["gate and up swapped"] = lambda gate, up: plain(up, gate)
        found["up projection left out"] = lambda gate, up: plain(gate, torch.ones_like(up))
    if mix.limit is not None:
        found["clamp left out"] = mixer(replace(mix, limit=None, limit_after=False))
    if mix.alpha != 1.0:
        found["α left out"] = mixer(replace(mix, alpha=1.0))
    if mix.offset:
        found["up offset left out"] = mixer(replace(mix, offset=0.0))
    return found


def reached(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> bool:
    """Whether any probe reaches the experts' clamp: where none does, leaving it out can't show."""
    if spec.experts.limit is None:
        return False
    half = F.linear(entering(tensors, probes.x[few_tokens(probes)], F64), tensors.w13[0].to(F64))
    return bool((half.abs() > spec.experts.limit).double().mean() > _REACHED)


def _zeroed(parts: Parts, everyone: Tensor) -> Twin:
    """One expert zeroed, for every expert."""
    ranks = parts.ids.shape[1]
    left = (parts.routed - parts.weights.T[..., None] * parts.outputs[:, :ranks].transpose(0, 1)).flatten(0, 1)
    tokens, experts = everyone.repeat(ranks), parts.ids.T.flatten()
    if parts.spec.experts.empty:
        acting = experts < parts.spec.experts.acting
        left, tokens, experts = left[acting], tokens[acting], experts[acting]
    return Twin("expert {case} zeroed", parts.output(left, tokens), tokens, experts)


def _exchanged(parts: Parts, tokens: Tensor, others: Tensor, out: Tensor) -> Twin:
    """Every expert exchanged with the one most like it, judged on a few tokens for each."""
    ids, weights, outputs = parts.ids[tokens], parts.weights[tokens], parts.outputs[tokens]
    experts = torch.arange(len(tokens), device=tokens.device) % parts.spec.experts.num_experts
    seen = (ids == experts[:, None]).any(-1)  # where no token is sent, an expert has no case
    tokens, others, out, experts = tokens[seen], others[seen], out[seen], experts[seen]
    ids, weights, outputs = ids[seen], weights[seen], outputs[seen]
    mine, theirs = ids == experts[:, None], ids == others[:, None]
    own = weighted_sum(outputs, mine.to(F64), F64)
    mine_weight = (weights * mine).sum(-1, keepdim=True)
    theirs_weight = (weights * theirs).sum(-1, keepdim=True)
    moved = (mine_weight - theirs_weight).where(mine_weight != 0, 0.0)
    y = parts.output(parts.routed[tokens] + moved * (out - own), tokens)
    return Twin("expert {case} exchanged with its nearest", y, tokens, experts)


def _scales(spec: MoESpec) -> bool:
    """Do experts make of a weighted input what weighting their output makes? A relu and matrices alone do."""
    return spec.experts.activation in ("relu", "leaky_relu") and not spec.experts.gated and not spec.experts.biases


def _one_weight(spec: MoESpec) -> bool:
    """Is every routing weight 1, whatever the scores?"""
    return spec.router.renormalize and spec.router.top_k == 1 and spec.router.scale == 1.0
