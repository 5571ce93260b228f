"""The reference: what a block computes, from its :class:`~moe_surgery.spec.MoESpec` and its weights alone.

The functions here are the ground truth of the proof, so they follow the formula in :mod:`moe_surgery.spec` and nothing
else: no kernel, no model code. Each takes ``dtype``. A dtype means that everything, the router included, is computed
in it, which with float64 is the truth. None means the block's own arithmetic: the weights' dtype, rounded where the
spec says that the block rounds. The distance between the two is the noise of the block's dtype.

Weights are converted one expert at a time, or a few, so a float64 copy of all experts never exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.kernels.arguments import by_row
from moe_surgery.spec import Activation, Mix, MoESpec
from moe_surgery.targets.e4m3 import E4M3, dequantised, entered
from moe_surgery.targets.formula import Arithmetic, Mixer, capped, mixer, ranked, scored, weighted
from moe_surgery.targets.shared_expert import shared_output, shared_parts
from moe_surgery.weights.own_router import AskedRouter
from moe_surgery.weights.tensors import BlockTensors, OwnRouting

_TOGETHER, _MOST = 128 << 20, 16
"""Bytes of converted weights, and experts, that are multiplied at a time on a GPU."""


def gated(activation: Activation) -> Mixer:
    """``act(gate) * up``."""
    return mixer(Mix(activation))


def router_scores(
    spec: MoESpec,
    router: Tensor,
    x: Tensor,
    dtype: torch.dtype | None,
    routing: OwnRouting | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits, not capped, and scores [T, E] of tokens [T, H], in the spec's dtypes unless ``dtype`` says otherwise.

    A router of the model's own gives the experts it chooses their weights for scores, and all others zero.
    """
    work = dtype or (torch.float32 if spec.router.logits_dtype == "float32" else x.dtype)
    logits = F.linear(x.to(work), router.to(work), None if bias is None else bias.to(work))
    if spec.router.own:
        return logits, own_scores(routing, x, logits, dtype)
    return logits, scores_of(spec, logits, Arithmetic(x.dtype) if dtype is None else Arithmetic(dtype, dtype))


def scores_of(spec: MoESpec, logits: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The scores [T, E] of logits [T, E] that are not capped yet."""
    return scored(spec.router, capped(spec.router, logits, arithmetic), arithmetic)


def ranking(spec: MoESpec, logits: Tensor, scores: Tensor, tensors: BlockTensors, arithmetic: Arithmetic) -> Tensor:
    """What experts are ranked by [T, E], with logits [T, E] that are not capped yet."""
    if spec.router.own:
        return scores.abs()  # those it doesn't choose are zero
    return ranked(spec.router, capped(spec.router, logits, arithmetic), scores, tensors.correction_bias, arithmetic)


def unrounded(spec: MoESpec, logits: Tensor, scores: Tensor, tensors: BlockTensors) -> Tensor:
    """What experts would be ranked by [T, E] if nothing were rounded, in the dtype of what is given.

    A saturated score ties experts whose logits differ, in any dtype; their logits don't.
    """
    if spec.router.follows_logits:
        return logits
    return ranking(spec, logits, scores, tensors, Arithmetic(scores.dtype, scores.dtype))


def chosen(spec: MoESpec, tensors: BlockTensors, x: Tensor) -> Tensor:
    """The experts [T, k] that the block's own arithmetic chooses for tokens [T, H] of its own dtype."""
    logits, scores = router_scores(spec, tensors.router, x, None, tensors.routing, tensors.router_bias)
    return ranking(spec, logits, scores, tensors, Arithmetic(x.dtype)).topk(spec.router.top_k, -1).indices


def own_scores(
    routing: OwnRouting | None, x: Tensor, logits: Tensor, dtype: torch.dtype | None, moved: Tensor | None = None
) -> Tensor:
    """What the model's own router gives each expert [T, E]: its weight where it chooses the expert, else zero.

    Routers take no float64; the truth asks them with logits in float32, and otherwise with those of the block itself.
    Where logits are ``moved`` [T, E], they have moved by that; it says so to routers that make logits of their own.
    """
    if routing is None:
        raise ValueError("the spec's routing is the model's own, and no router is given")
    if moved is not None and isinstance(routing, AskedRouter):
        weights, ids = routing.moved(x, moved / logits.abs().amax(-1, keepdim=True).clamp_min(1e-300))
    else:
        weights, ids = routing(x, logits if dtype is None else logits.float())
    scores = torch.zeros_like(logits, dtype=dtype or torch.float32)
    return scores.scatter(-1, ids.long(), weights.to(scores.dtype))


def entering(tensors: BlockTensors, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What the routed experts are given of tokens [T, H]; ``dtype`` as in :func:`forward`."""
    if isinstance(tensors.routing, AskedRouter):
        return tensors.routing.entering(x, dtype)
    return x if dtype is None else x.to(dtype)


def whole(tensors: BlockTensors, x: Tensor, routed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a block's own operations make of tokens [T, H] whose routed experts come to ``routed`` [T, H]."""
    return tensors.routing.whole(x, routed, dtype) if isinstance(tensors.routing, AskedRouter) else routed


def routing_weights(spec: MoESpec, scores: Tensor, ids: Tensor) -> Tensor:
    """Weights [T, k] of the chosen experts ``ids`` [T, k], renormalised and scaled as the spec says."""
    return weighted(spec.router, scores, ids)


@dataclass(frozen=True, eq=False)
class Visits:
    """Tokens on their way to experts: row ``p`` of ``x`` [P, H] visits expert ``experts[p]``."""

    x: Tensor
    experts: Tensor
    mix: Mixer


def expert_outputs(tensors: BlockTensors, visits: Sequence[Visits], dtype: torch.dtype | None) -> list[Tensor]:
    """The unweighted output [P, H] of every visit; one pass over the experts serves all of them.

    Only the experts that are visited are read, and each is converted to ``dtype`` once.
    """
    work, total, scales = dtype or visits[0].x.dtype, tensors.w13.shape[0], tensors.scales
    sizes = [len(visit.experts) for visit in visits]
    # What no expert below fills in belongs to experts that return their input, or add nothing and were given zeros.
    rows = torch.cat([visit.x for visit in visits]).to(work)
    experts = torch.cat([visit.experts for visit in visits]).clamp_max(total)
    counts = torch.bincount(experts, minlength=total).tolist()[:total]
    # Rows in the order of their experts, so that little is launched for each: on a GPU that is what takes the time.
    order = experts.argsort(stable=True)[: sum(counts)]
    given, scale = rows[order], None if scales is None else scales.w13
    given = given if scale is None else entered(given, tensors.w13, scale)
    products = _products(given, counts, tensors.w13, scale, tensors.w13_bias)
    if scales is not None:  # what they make goes from float32 to e4m3
        products = products.to(scales.dtype).to(torch.promote_types(work, torch.float32))
    both = products.new_zeros(len(rows), products.shape[1]).index_copy_(0, order, products)
    gates, ups = both.chunk(2, -1) if tensors.w13.shape[1] != tensors.w2.shape[2] else (both, both)
    parts = zip(visits, gates.split(sizes), ups.split(sizes), strict=True)
    mixed = torch.cat([visit.mix(gate, up) for visit, gate, up in parts])
    mixed, scale = mixed[order], None if scales is None else scales.w2
    if scales is not None and scale is not None:
        if by_row(tensors.w2, scale):  # all of a row must be there before it is rounded to e4m3, so it is stored
            mixed = mixed.to(scales.dtype).to(mixed.dtype)
        mixed = entered(mixed, tensors.w2, scale, between=True)
    outputs = _products(mixed, counts, tensors.w2, scale, tensors.w2_bias)
    return list(rows.index_copy_(0, order, outputs.to(work)).split(sizes))


def _products(
    rows: Tensor,
    counts: Sequence[int],
    weights: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    together: int | None = None,
) -> Tensor:
    """Each expert's matrix times its own ``rows``: the first ``counts[0]`` are the first expert's, and so on.

    So many experts ``together`` are multiplied at a time; on a CPU, unless that is given, one.
    """
    out, start = rows.new_empty(len(rows), weights.shape[1]), 0
    if together is None:
        size = weights[0].numel() * rows.element_size()
        together = 1 if rows.device.type == "cpu" else min(max(_TOGETHER // size, 1), _MOST)
    experts = [expert for expert, count in enumerate(counts) if count]
    places = _places([counts[expert] for expert in experts], together, rows.device)
    for first in range(0, len(experts), together):
        some = experts[first : first + together]
        end = start + sum(counts[expert] for expert in some)
        biases = None if bias is None else _some(bias, some).to(rows.dtype)
        # The converted matrices have no name, or they would still be there when the next are made.
        if together == 1:
            its = None if biases is None else biases[0]
            out[start:end] = F.linear(rows[start:end], _converted(weights, scales, some, rows.dtype)[0], its)
        else:
            given, kept = next(places)
            out[start:end] = _each(rows[given], _converted(weights, scales, some, rows.dtype), biases)[kept]
        start = end
    return out


def _places(sizes: Sequence[int], together: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that so many experts ``together`` are given [E, P], and which of their products [E * P] are kept.

    Expert after expert has ``sizes`` of the rows, which are repeated until all experts of a part have as many. All is
    worked out on the CPU and moved at once: on a GPU it is launching and waiting that takes the time.
    """
    parts = [sizes[first : first + together] for first in range(0, len(sizes), together)]
    shapes = [(len(part), max(part)) for part in parts]
    lengths = torch.tensor([most for count, most in shapes for _ in range(count)], device="cpu")
    own, begins = torch.tensor(sizes, device="cpu"), lengths.cumsum(0) - lengths
    expert = torch.arange(len(sizes), device="cpu").repeat_interleave(lengths)
    place = torch.arange(len(expert), device="cpu") - begins[expert]
    given = (own.cumsum(0) - own)[expert] + place.minimum(own[expert] - 1)
    there = place < own[expert]
    kept = there.nonzero().flatten() - begins[::together][expert[there] // together]
    given, kept = torch.cat([given, kept]).to(device).split([len(given), len(kept)])
    at_once = given.split([count * most for count, most in shapes])
    for rows, shape, mine in zip(at_once, shapes, kept.split([sum(part) for part in parts]), strict=True):
        yield rows.view(shape), mine


def _converted(weights: Tensor, scales: Tensor | None, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Some experts' matrices in ``dtype``."""
    if scales is None:
        return _some(weights, experts).to(dtype)
    return dequantised(_some(weights.view(torch.uint8), experts).view(E4M3), _some(scales, experts), dtype)


def _each(rows: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
    """The ``rows`` [E, P, H] times each of the ``matrices`` [E, N, H], one after the other: [E * P, N]."""
    products = torch.bmm(rows, matrices.transpose(1, 2))
    return (products if biases is None else products + biases[:, None]).flatten(0, 1)


def _some(weights: Tensor, experts: Sequence[int]) -> Tensor:
    """Those of these experts; not copied where they lie side by side."""
    first, last = experts[0], experts[-1]
    return weights[first : last + 1] if last - first + 1 == len(experts) else weights[list(experts)]


def weighted_sum(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_j weights[:, j] * outputs[:, j]``: [T, k, H], [T, k] → [T, H]; each term is rounded to ``dtype``."""
    if outputs.dtype == weights.dtype == dtype == torch.float64:  # the truth, whose own rounding counts for nothing
        return torch.bmm(weights[:, None], outputs[:, : weights.shape[1]])[:, 0]
    total = (outputs[:, 0] * weights[:, :1]).to(dtype)
    for rank in range(1, weights.shape[1]):
        total += (outputs[:, rank] * weights[:, rank, None]).to(dtype)
    return total


def routed_sum(spec: MoESpec, scores: Tensor, ids: Tensor, outputs: Tensor) -> Tensor:
    """The routed experts' share [T, H] of the output, from ``outputs`` [T, k, H] of the experts ``ids`` [T, k]."""
    weights = applied_weights(spec, scores, ids)
    if spec.router.weights_dtype == "native":
        weights = weights.to(outputs.dtype)
    return weighted_sum(outputs, weights, outputs.dtype)


def applied_weights(spec: MoESpec, scores: Tensor, ids: Tensor) -> Tensor:
    """The weights [T, k] of the experts' outputs: one, where the routing weights apply to their inputs."""
    weights = routing_weights(spec, scores, ids)
    return torch.ones_like(weights) if spec.experts.weights_on == "input" else weights


def within(ids: Tensor, weights: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k] in which ids beyond the experts or below zero, which stand for none, have weight zero."""
    beyond = (ids >= total) | (ids < 0)
    return ids.masked_fill(beyond, 0), weights.masked_fill(beyond, 0)


def given(spec: MoESpec, rows: Tensor, experts: Tensor) -> Tensor:
    """What ``experts`` [P] make their outputs of: ``rows`` [P, H], but zeros for those that add nothing."""
    return rows.masked_fill((experts >= spec.experts.acting)[:, None], 0) if spec.experts.empty else rows


def visited(spec: MoESpec, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    """What the experts ``ids`` [T, k] are given: tokens [T, H], repeated [T * k, H], weighted where weights go in."""
    wide = given(spec, x.repeat_interleave(ids.shape[1], 0), ids.flatten())
    if spec.experts.weights_on == "output":
        return wide
    weights = routing_weights(spec, scores, ids).reshape(-1, 1)
    return wide * weights.to(x.dtype)


def forward(
    spec: MoESpec, tensors: BlockTensors, x: Tensor, dtype: torch.dtype | None = None, ids: Tensor | None = None
) -> Tensor:
    """The block's output [T, H] for tokens [T, H], in ``dtype`` or in the block's own arithmetic.

    ``ids`` [T, k] are the experts to visit, where they are chosen already.
    """
    if ids is None and dtype is None:
        ids = chosen(spec, tensors, x)
    logits, scores = router_scores(spec, tensors.router, x, dtype, tensors.routing, tensors.router_bias)
    if ids is None:
        ids = unrounded(spec, logits, scores, tensors).topk(spec.router.top_k, -1).indices
    visits = Visits(visited(spec, entering(tensors, x, dtype), scores, ids), ids.flatten(), mixer(spec.experts.mix))
    [outputs] = expert_outputs(tensors, [visits], dtype)
    out = routed_sum(spec, scores, ids, outputs.view(*ids.shape, outputs.shape[-1]))
    if spec.shared is not None:
        out = out + shared_output(spec, *shared_parts(tensors, x, mixer(spec.shared.mix), dtype))
    out = out if tensors.output_bias is None else out + tensors.output_bias.to(out.dtype)
    return whole(tensors, x, out, dtype)
