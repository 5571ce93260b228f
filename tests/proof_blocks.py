"""Blocks for the proof's tests: a second, independent implementation of a spec, and wrong ones made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from spec_weights import weights
from torch import Tensor, nn

from moe_surgery.prove.proof import prove
from moe_surgery.prove.verdict import Verdict
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.targets.reference_target import ReferenceTarget
from moe_surgery.weights.tensors import BlockTensors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
TALKER = MoESpec(
    hidden=64,
    router=RouterSpec(num_experts=16, top_k=4, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=16, width=24, activation="silu"),
    shared=SharedSpec(width=48, activation="silu", gate="sigmoid"),
)
THINKER = replace(TALKER, router=replace(TALKER.router, renormalize=False), shared=None)
DTYPES = [torch.float32, torch.bfloat16]


class PlainBlock(nn.Module):
    """The spec written once more, densely: every expert sees every token. Methods are overridden to make it wrong."""

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        super().__init__()
        self.spec, self.t = spec, tensors
        self.scores_dtype = torch.float32  # as transformers' blocks, in every dtype

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.t.router.T

    def scores(self, logits: Tensor) -> Tensor:
        wide = logits.to(self.scores_dtype)
        return wide.softmax(-1) if self.spec.router.scoring == "softmax" else wide.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        return scores.sort(-1, descending=True).indices[:, : self.spec.router.top_k]

    def weigh(self, chosen: Tensor) -> Tensor:
        if self.spec.router.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen * self.spec.router.scale

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[self.spec.experts.activation](gate) * up

    def experts(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("th,eih->tei", x, self.t.w13).chunk(2, -1)
        return torch.einsum("tei,ehi->teh", self.mix(gate, up), self.t.w2)

    def routed(self, x: Tensor) -> Tensor:
        scores = self.scores(self.logits(x))
        ids = self.choose(scores)
        weights = self.weigh(scores.gather(1, ids)).to(x.dtype)
        return self.combine(self.experts(x).take_along_dim(ids[..., None], 1), weights)

    def combine(self, outputs: Tensor, weights: Tensor) -> Tensor:
        return (outputs * weights[..., None]).sum(1)

    def shared_mix(self, gate: Tensor, up: Tensor) -> Tensor:
        assert self.spec.shared is not None
        return ACTIVATIONS[self.spec.shared.activation](gate) * up

    def shared_gate(self, x: Tensor) -> Tensor | float:
        return 1.0 if self.t.shared_gate is None else (x @ self.t.shared_gate.T).sigmoid()

    def shared(self, x: Tensor) -> Tensor | float:
        if self.spec.shared is None:
            return 0.0
        assert self.t.shared_gate_proj is not None
        assert self.t.shared_up_proj is not None
        assert self.t.shared_down_proj is not None
        inner = self.shared_mix(x @ self.t.shared_gate_proj.T, x @ self.t.shared_up_proj.T)
        return self.shared_gate(x) * self.spec.shared.scale * (inner @ self.t.shared_down_proj.T)

    def tokens(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.reshape(-1, x.shape[-1])).view(x.shape)


def reference(spec: MoESpec, tensors: BlockTensors) -> nn.Module:
    return ReferenceTarget().build(spec, tensors, prefix="mlp")


def judge(new: type[PlainBlock], spec: MoESpec, dtype: torch.dtype = torch.float32) -> Verdict:
    """The verdict on a kind of block as the replacement of a right one."""
    tensors = weights(spec, dtype)
    return prove(PlainBlock(spec, tensors), new(spec, tensors), spec, tensors)


def wrong(**methods: Any) -> type[PlainBlock]:
    """A subclass of :class:`PlainBlock` with some methods replaced."""
    return type("Wrong", (PlainBlock,), methods)


def _without_expert(self: PlainBlock, x: Tensor) -> Tensor:
    y = PlainBlock.experts(self, x)
    y[:, 3] = 0
    return y


def _exchanged(self: PlainBlock, x: Tensor) -> Tensor:
    order = list(range(self.spec.experts.num_experts))
    order[0], order[1] = 1, 0
    return PlainBlock.experts(self, x)[:, order]


def _weights_on_inputs(self: PlainBlock, x: Tensor) -> Tensor:
    scores = self.scores(self.logits(x))
    ids = self.choose(scores)
    weights = self.weigh(scores.gather(1, ids)).to(x.dtype)
    outputs = [
        self.experts(x * weights[:, j, None]).take_along_dim(ids[:, j, None, None], 1)[:, 0]
        for j in range(ids.shape[1])
    ]
    return torch.stack(outputs).sum(0)


def _toggled(self: PlainBlock, chosen: Tensor) -> Tensor:
    if not self.spec.router.renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return chosen * self.spec.router.scale


def _ranks(first: int, more: int) -> Callable[[PlainBlock, Tensor], Tensor]:
    """Chooses the ranks from ``first`` on, ``more`` of them than it should."""
    return lambda self, scores: scores.sort(-1, descending=True).indices[
        :, first : first + self.spec.router.top_k + more
    ]


ROUTED_MISTAKES: dict[str, type[PlainBlock]] = {
    "routed dropped": wrong(routed=lambda self, x: 0 * x),
    "routed doubled": wrong(routed=lambda self, x: 2 * PlainBlock.routed(self, x)),
    "gate and up swapped": wrong(mix=lambda self, gate, up: PlainBlock.mix(self, up, gate)),
    "another activation": wrong(mix=lambda self, gate, up: F.gelu(gate) * up),
    "up left out": wrong(mix=lambda self, gate, up: F.silu(gate)),
    "renormalising or not": wrong(weigh=_toggled),
    "top-k less one": wrong(choose=_ranks(0, -1)),
    "top-k plus one": wrong(choose=_ranks(0, 1)),
    "ranks shifted": wrong(choose=_ranks(1, 0)),
    "lowest scores": wrong(choose=lambda self, scores: scores.sort(-1).indices[:, : self.spec.router.top_k]),
    "one expert zeroed": wrong(experts=_without_expert),
    "two experts exchanged": wrong(experts=_exchanged),
    "router in another order": wrong(logits=lambda self, x: PlainBlock.logits(self, x).roll(1, -1)),
    "sigmoid scores": wrong(scores=lambda self, logits: logits.to(self.scores_dtype).sigmoid()),
    "uniform weights": wrong(weigh=lambda self, chosen: chosen.mean(-1, keepdim=True).expand_as(chosen)),
    "weights in reverse": wrong(weigh=lambda self, chosen: PlainBlock.weigh(self, chosen).flip(-1)),
    "weights on the inputs": wrong(routed=_weights_on_inputs),
    "tokens shifted": wrong(tokens=lambda self, x: PlainBlock.tokens(self, x).roll(1, 0)),
}
SHARED_MISTAKES: dict[str, type[PlainBlock]] = {
    "shared dropped": wrong(shared=lambda self, x: 0.0),
    "shared doubled": wrong(shared=lambda self, x: 2 * PlainBlock.shared(self, x)),
    "shared ungated": wrong(shared_gate=lambda self, x: 1.0),
    "shared gate without its sigmoid": wrong(shared_gate=lambda self, x: x @ self.t.shared_gate.T),
    "shared gate and up swapped": wrong(shared_mix=lambda self, gate, up: PlainBlock.shared_mix(self, up, gate)),
    "shared with another activation": wrong(shared_mix=lambda self, gate, up: F.gelu(gate) * up),
}
