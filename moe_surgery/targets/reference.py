"""The reference: a block in plain torch from a :class:`~moe_surgery.spec.MoESpec` and its weights alone.

The functions here are the ground truth of the proof, so they follow the formula in :mod:`moe_surgery.spec` and nothing
else: no kernel, no model code. Each takes ``dtype``. A dtype means that everything, the router included, is computed
in it, which with float64 is the truth. None means the block's own arithmetic: the weights' dtype, rounded where the
spec says that the block rounds. The distance between the two is the noise of the block's dtype.

Weights are converted one expert at a time, so a float64 copy of all experts never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.spec import Activation, ExpertsSpec, MoESpec
from moe_surgery.targets.base import Context, Refusal, SwappedBlock
from moe_surgery.weights.tensors import BlockTensors, OwnRouting

Mix = Callable[[Tensor, Tensor], Tensor]
"""What stands between a gated MLP's matrices: ``(gate, up) -> input of down``, all of one shape."""

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated(activation: Activation) -> Mix:
    """``act(gate) * up``."""
    act = _ACTIVATIONS[activation]
    return lambda gate, up: act(gate) * up


def router_scores(
    spec: MoESpec, router: Tensor, x: Tensor, dtype: torch.dtype | None, routing: OwnRouting | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and scores [T, E] of tokens [T, H]; scores are float32 unless ``dtype`` says otherwise.

    A router of the model's own gives the experts it chooses their weights for scores, and all others zero.
    """
    work = dtype or (torch.float32 if spec.router.logits_dtype == "float32" else x.dtype)
    logits = F.linear(x.to(work), router.to(work))
    if spec.router.scoring == "own":
        return logits, own_scores(routing, x, logits, dtype)
    wide = logits.to(dtype or (torch.float32 if spec.router.scores_dtype == "float32" else logits.dtype))
    return logits, wide.softmax(-1) if spec.router.scoring == "softmax" else wide.sigmoid()


def own_scores(routing: OwnRouting | None, x: Tensor, logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What the model's own router gives each expert [T, E]: its weight where it chooses the expert, else zero.

    Routers take no float64; the truth asks them with logits in float32, and otherwise with those of the block itself.
    """
    if routing is None:
        raise ValueError("the spec's routing is the model's own, and no router is given")
    weights, ids = routing(x, logits if dtype is None else logits.float())
    scores = torch.zeros_like(logits, dtype=dtype or torch.float32)
    return scores.scatter(-1, ids.long(), weights.to(scores.dtype))


def routing_weights(spec: MoESpec, scores: Tensor, ids: Tensor) -> Tensor:
    """Weights [T, k] of the chosen experts ``ids`` [T, k], renormalised and scaled as the spec says."""
    weights = scores.gather(-1, ids)
    if spec.router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * spec.router.scale


@dataclass(frozen=True, eq=False)
class Visits:
    """Tokens on their way to experts: row ``p`` of ``x`` [P, H] visits expert ``experts[p]``."""

    x: Tensor
    experts: Tensor
    mix: Mix


def expert_outputs(tensors: BlockTensors, visits: Sequence[Visits], dtype: torch.dtype | None) -> list[Tensor]:
    """The unweighted output [P, H] of every visit; one pass over the experts serves all of them.

    Only the experts that are visited are read, and each is converted to ``dtype`` once.
    """
    work = dtype or tensors.w13.dtype
    results = [torch.empty_like(visit.x, dtype=work) for visit in visits]
    orders = [visit.experts.argsort(stable=True) for visit in visits]
    counts = torch.stack([torch.bincount(v.experts, minlength=tensors.w13.shape[0]) for v in visits]).tolist()
    starts = [0] * len(visits)
    for expert in range(tensors.w13.shape[0]):
        sizes = [count[expert] for count in counts]
        if not any(sizes):
            continue
        picks = [order[start : start + size] for order, start, size in zip(orders, starts, sizes, strict=True)]
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        x = torch.cat([visit.x[pick] for visit, pick in zip(visits, picks, strict=True)]).to(work)
        gate, up = F.linear(x, tensors.w13[expert].to(work)).chunk(2, -1)
        parts = zip(visits, gate.split(sizes), up.split(sizes), strict=True)
        mixed = torch.cat([visit.mix(g, u) for visit, g, u in parts])
        y = F.linear(mixed, tensors.w2[expert].to(work))
        for result, pick, rows in zip(results, picks, y.split(sizes), strict=True):
            result[pick] = rows
    return results


def shared_parts(tensors: BlockTensors, x: Tensor, mix: Mix, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """The shared expert's ungated output [T, H] and its gate's logit [T, 1], or None where nothing gates it."""
    gate, up, down = tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj
    assert gate is not None and up is not None and down is not None
    work = dtype or x.dtype
    x = x.to(work)
    out = F.linear(mix(F.linear(x, gate.to(work)), F.linear(x, up.to(work))), down.to(work))
    return out, None if tensors.shared_gate is None else F.linear(x, tensors.shared_gate.to(work))


def shared_output(spec: MoESpec, out: Tensor, gate: Tensor | None) -> Tensor:
    """What :func:`shared_parts` found, gated and scaled."""
    assert spec.shared is not None
    if gate is not None:
        out = gate.sigmoid() * out
    return out * spec.shared.scale if spec.shared.scale != 1.0 else out


def weighted_sum(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_j weights[:, j] * outputs[:, j]``: [T, k, H], [T, k] → [T, H]; each term is rounded to ``dtype``."""
    total = (outputs[:, 0] * weights[:, :1]).to(dtype)
    for rank in range(1, weights.shape[1]):
        total += (outputs[:, rank] * weights[:, rank, None]).to(dtype)
    return total


def routed_sum(spec: MoESpec, scores: Tensor, ids: Tensor, outputs: Tensor) -> Tensor:
    """The routed experts' share [T, H] of the output, from ``outputs`` [T, k, H] of the experts ``ids`` [T, k]."""
    weights = routing_weights(spec, scores, ids)
    if spec.router.weights_dtype == "native":
        weights = weights.to(outputs.dtype)
    return weighted_sum(outputs, weights, outputs.dtype)


def forward(spec: MoESpec, tensors: BlockTensors, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The block's output [T, H] for tokens [T, H], in ``dtype`` or in the block's own arithmetic."""
    logits, scores = router_scores(spec, tensors.router, x, dtype, tensors.routing)
    # A saturated sigmoid ties experts whose logits differ: blocks rank what they round, the truth doesn't round.
    ranked = scores if dtype is None or spec.router.scoring == "own" else logits
    ids = ranked.topk(spec.router.top_k, -1).indices
    visits = Visits(x.repeat_interleave(ids.shape[1], 0), ids.flatten(), gated(spec.experts.activation))
    [outputs] = expert_outputs(tensors, [visits], dtype)
    out = routed_sum(spec, scores, ids, outputs.view(*ids.shape, x.shape[-1]))
    if spec.shared is not None:
        out = out + shared_output(spec, *shared_parts(tensors, x, gated(spec.shared.activation), dtype))
    return out


class ReferenceBlock(SwappedBlock):
    """A block that computes in float64 if it is a float64 block and in float32 otherwise, then rounds once.

    Takes and returns ``[..., H]`` in the weights' dtype. The weights are used by reference and take no gradient.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        super().__init__()
        self.spec = spec
        self.label = ReferenceTarget.label
        for name in (*_REQUIRED, *_OPTIONAL):
            tensor = getattr(tensors, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        size = sum(parameter.nbytes for parameter in self.parameters())
        stacked = tensors.w13.nbytes + tensors.w2.nbytes if tensors.copied else 0
        self.new_bytes, self.moved_bytes = stacked, size - stacked

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: getattr(self, name) for name in (*_REQUIRED, *_OPTIONAL)}
        tensors = BlockTensors(**weights, copied=False)
        work = torch.promote_types(x.dtype, torch.float32)
        return forward(self.spec, tensors, x.reshape(-1, x.shape[-1]), work).to(x.dtype).view(x.shape)


_REQUIRED = ("router", "w13", "w2")
_OPTIONAL = ("shared_gate_proj", "shared_up_proj", "shared_down_proj", "shared_gate")


class ReferenceTarget:
    """The target ``reference``: slow, plain, and right wherever torch runs."""

    name = "reference"
    label = "plain torch reference"

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """Every spec, in every floating dtype that torch multiplies matrices in."""
        if context.dtype not in _DTYPES:
            return Refusal(f"the reference computes in {', '.join(_DTYPES)}, not in {context.dtype}")
        if misfit := _misfit(spec.experts, spec):
            return Refusal(misfit)
        return None

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> SwappedBlock:
        return ReferenceBlock(spec, tensors)


_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _misfit(experts: ExpertsSpec, spec: MoESpec) -> str | None:
    if experts.num_experts != spec.router.num_experts:
        return f"the router scores {spec.router.num_experts} experts, but there are {experts.num_experts}"
    if not 1 <= spec.router.top_k <= experts.num_experts:
        return f"top-{spec.router.top_k} of {experts.num_experts} experts can't be chosen"
    return None
