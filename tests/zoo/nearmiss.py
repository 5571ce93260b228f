"""Blocks that are one semantic change away from the plain one.

``words`` are what the reason must name (one of them is enough) if a block is left alone. Blocks without words are to be
replaced: the change is one that a spec can say, or none at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import plain
from .plain import MLP, Base, ListOfMLPs, block_class, linear, parameter


@dataclass(frozen=True)
class Case:
    """One block. ``make`` gives a new one, float32 and in eval mode, with the same weights every time.

    ``cls`` is the part that makes the difference, where it can be combined with other spellings of the rest.
    """

    name: str
    make: Callable[[], nn.Module]
    words: tuple[str, ...] = ()
    cls: type[Base] | None = None

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def near_miss(*words: str, parts: tuple[type[Base], ...] = ()) -> Callable[[type[Base]], type[Base]]:
    """Register a class that overrides one part of the plain block (of ``parts``, the first spellings by default)."""

    def register(cls: type[Base]) -> type[Base]:
        whole = block_class(cls, *parts, name=cls.__name__)
        CASES.append(Case(cls.__name__, lambda: plain.make(whole), words, cls))
        return cls

    return register


def altered(*words: str, parts: tuple[type[Base], ...] = ()) -> Callable[[Any], Any]:
    """Register a function that changes an instance of the plain block."""

    def register(change: Callable[[Any], Any]) -> Any:
        def build() -> nn.Module:
            block = plain.make(block_class(*parts, name="Altered"))
            with torch.random.fork_rng():  # every one that is made is the same, whatever was drawn before
                torch.manual_seed(0)
                changed = change(block)
            return (block if changed is None else changed).eval().requires_grad_(False)

        CASES.append(Case(change.__name__, build, words))
        return change

    return register


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


# Norms


@near_miss("rsqrt")
class NormBefore(Base):
    def make_more(self) -> None:
        self.norm = RMSNorm(self.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(self.norm(hidden_states))


@near_miss("rsqrt")
class NormAfter(Base):
    def make_more(self) -> None:
        self.norm = RMSNorm(self.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(super().forward(hidden_states))


@near_miss("rsqrt")
class NormOnShared(Base):
    def make_more(self) -> None:
        self.norm = RMSNorm(self.hidden)

    def shared(self, x: Tensor) -> Tensor | None:
        return super().shared(self.norm(x))


@near_miss("rsqrt")
class NormOnRouted(Base):
    def make_more(self) -> None:
        self.norm = RMSNorm(self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.norm(super().routed(x, weights, ids))


@near_miss("layer_norm", "norm")
class LayerNormOnRouter(Base):
    def make_more(self) -> None:
        self.norm = nn.LayerNorm(self.hidden)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.norm(x))


@near_miss("normalize", "norm")
class CosineRouter(Base):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(F.normalize(x, dim=-1))


# Scales


@near_miss()
class RoutedScaled(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return 2.5 * routed + shared


@near_miss()
class SharedScaled(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + shared / 3


@near_miss()
class SumScaled(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return 0.5 * (routed + shared)


@near_miss()
class WeightsScaledBeforeRenormalising(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k)
        weights = 2.5 * weights
        return weights / weights.sum(-1, keepdim=True), ids


@near_miss()
class RenormalisedTwiceWithScaleBetween(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True) * 3.0
        return weights / weights.sum(-1, keepdim=True), ids


@near_miss()
class SharedSubtracted(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed - shared


@near_miss("layer_scale")
class LearnedScale(Base):
    def make_more(self) -> None:
        self.layer_scale = nn.Parameter(torch.tensor(0.7))

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return self.layer_scale * routed + shared


@near_miss("channel_scale")
class LearnedScalePerChannel(Base):
    def make_more(self) -> None:
        self.channel_scale = nn.Parameter(torch.ones(self.hidden))

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + self.channel_scale * shared


@near_miss("expert_scale")
class LearnedScalePerExpert(Base):
    def make_more(self) -> None:
        self.expert_scale = nn.Parameter(1 + 0.1 * torch.randn(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * self.expert_scale[ids], ids


@near_miss("temperature", "logits")
class Temperature(Base):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) / 0.7


# Residuals, biases, buffers


@near_miss("adds")
class Residual(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + super().forward(hidden_states)


@near_miss("between its maps")
class ResidualInsideExpert(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x) + x


@near_miss()
class RouterBias(Base):
    def make_router(self) -> None:
        self.gate = nn.Linear(self.hidden, self.num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x)


class BiasedMLP(MLP):
    biased = ""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__(hidden, width)
        layer = getattr(self, self.biased)
        layer.bias = nn.Parameter(torch.randn(layer.out_features))


class GateBiasMLP(BiasedMLP):
    biased = "gate_proj"


class UpBiasMLP(BiasedMLP):
    biased = "up_proj"


class DownBiasMLP(BiasedMLP):
    biased = "down_proj"


@near_miss(parts=(ListOfMLPs,))
class ExpertGateBias(Base):
    def make_expert(self) -> nn.Module:
        return GateBiasMLP(self.hidden, self.width)


@near_miss(parts=(ListOfMLPs,))
class ExpertUpBias(Base):
    def make_expert(self) -> nn.Module:
        return UpBiasMLP(self.hidden, self.width)


@near_miss(parts=(ListOfMLPs,))
class ExpertDownBias(Base):
    def make_expert(self) -> nn.Module:
        return DownBiasMLP(self.hidden, self.width)


@near_miss("down_proj.bias", "shared expert has biases")
class SharedDownBias(Base):
    def make_shared(self) -> None:
        self.shared_expert = DownBiasMLP(self.hidden, self.shared_width)
        self.shared_expert_gate = linear(self.hidden, 1)


@near_miss("shared_expert_gate.bias", "shared expert is multiplied")
class SharedGateBias(Base):
    def make_shared(self) -> None:
        super().make_shared()
        self.shared_expert_gate = nn.Linear(self.hidden, 1)


@near_miss()
class BlockBias(Base):
    def make_more(self) -> None:
        self.register_buffer("output_bias", torch.randn(self.hidden))

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + shared + self.output_bias


class SelectionBias(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        _, ids = torch.topk(scores + self.e_score_correction_bias, self.top_k)
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids


@near_miss()
class SelectionBiasBuffer(SelectionBias):
    def make_more(self) -> None:
        self.register_buffer("e_score_correction_bias", 0.3 * torch.randn(self.num_experts))


@near_miss()
class SelectionBiasParameter(SelectionBias):
    def make_more(self) -> None:
        self.e_score_correction_bias = nn.Parameter(0.3 * torch.randn(self.num_experts))


@near_miss()
class SelectionBiasOfZeros(SelectionBias):
    def make_more(self) -> None:
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))


@near_miss("unused")
class UnusedBuffer(Base):
    def make_more(self) -> None:
        self.register_buffer("unused", torch.ones(self.num_experts))


@near_miss("unused")
class UnusedParameter(Base):
    def make_more(self) -> None:
        self.unused = nn.Parameter(torch.ones(3, 3))


@near_miss("mask_of_experts takes no part")
class IntegerBuffer(Base):
    def make_more(self) -> None:
        self.register_buffer("mask_of_experts", torch.ones(self.num_experts, dtype=torch.long))


@near_miss("calls")
class EveryOtherCall(Base):
    def make_more(self) -> None:
        self.register_buffer("calls", torch.zeros(1))

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        self.calls += 1
        return super().combine(x, routed * (self.calls % 2), shared)


@near_miss("writes to tokens_per_expert, of which something else comes too")
class LessOfTheBusy(Base):
    """Its ranking is corrected by the loads of the calls before."""

    def make_more(self) -> None:
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).softmax(-1)
        ids = (scores - 0.01 * self.tokens_per_expert).topk(self.top_k, dim=-1).indices
        self.tokens_per_expert.add_(torch.bincount(ids.flatten(), minlength=self.num_experts))
        return scores.gather(1, ids), ids


# Clamps, caps and other functions of values


@near_miss("clamp")
class LogitsClamped(Base):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).clamp(-2, 2)


@near_miss()
class LogitsCapped(Base):
    def logits(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(super().logits(x) / 3)


@near_miss("clamp")
class GateClamped(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x.clamp(max=1.5))


@near_miss("clamp")
class ActivationClamped(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x).clamp(max=1.5)


@near_miss("clamp")
class OutputClamped(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).clamp(-1, 1)


@near_miss("clamp")
class OutputClampedFarAway(Base):
    """Bites only where float16 would overflow."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.clamp(super().forward(hidden_states), -65504, 65504)


@near_miss("nan_to_num")
class NansRemoved(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.nan_to_num(super().forward(hidden_states))


@near_miss("values")
class BranchOnValues(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out if hidden_states.abs().max() < 10 else 0.5 * out


@near_miss("finite")
class BranchOnNan(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        if torch.isnan(out).any():
            out = torch.zeros_like(out)
        return out


@near_miss("values")
class WhereOnValues(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.where(hidden_states > 3, hidden_states, super().forward(hidden_states))


@near_miss("values")
class BranchInsideTry(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        try:
            if float(hidden_states.sum()) > 10:
                out = out * 2
        except Exception:
            pass
        return out


@near_miss("values")
class ThresholdOnWeights(Base):
    """Drops experts of little weight."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * (weights > 0.3), ids


# Activations and gates


@near_miss()
class GeluExact(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.gelu(x)


@near_miss()
class GeluTanh(Base):
    def act(self, x: Tensor) -> Tensor:
        return nn.GELU(approximate="tanh")(x)


@near_miss()
class ReluExperts(Base):
    def act(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@near_miss()
class Relu2(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@near_miss()
class QuickGelu(Base):
    def act(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@near_miss()
class TanhExperts(Base):
    def act(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@near_miss("hardtanh")
class HardtanhExperts(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.hardtanh(x)


@near_miss()
class UngatedExperts(Base):
    def make_experts(self) -> None:
        self.up_proj = parameter(self.num_experts, self.width, self.hidden)
        self.down_proj = parameter(self.num_experts, self.hidden, self.width)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up_proj[number])), self.down_proj[number])


@near_miss()
class SwigluOai(Base):
    """gpt-oss: clamps, a steeper sigmoid, and up + 1."""

    def expert(self, number: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[number]).chunk(2, -1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return F.linear((up + 1) * gate * torch.sigmoid(gate * 1.702), self.down_proj[number])


@near_miss()
class UpPlusOne(Base):
    def expert(self, number: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[number]).chunk(2, -1)
        return F.linear(F.silu(gate) * (up + 1), self.down_proj[number])


@near_miss("interleaved")
class InterleavedGateUp(Base):
    def expert(self, number: Any, x: Tensor) -> Tensor:
        weight = self.gate_up_proj[number]
        return F.linear(F.silu(F.linear(x, weight[::2])) * F.linear(x, weight[1::2]), self.down_proj[number])


@near_miss()
class InterleavedAfterwards(Base):
    def expert(self, number: Any, x: Tensor) -> Tensor:
        both = F.linear(x, self.gate_up_proj[number])
        return F.linear(F.silu(both[..., ::2]) * both[..., 1::2], self.down_proj[number])


@near_miss()
class TransposedGateUp(Base):
    """Stored [E, H, 2I]."""

    def make_experts(self) -> None:
        self.gate_up_proj = parameter(self.num_experts, self.hidden, 2 * self.width)
        self.down_proj = parameter(self.num_experts, self.width, self.hidden)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up_proj[number]).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down_proj[number]


class OtherGate(Base):
    def gate_of_shared(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shared(self, x: Tensor) -> Tensor | None:
        return self.gate_of_shared(x) * self.shared_expert(x)


@near_miss("tanh")
class TanhGate(OtherGate):
    def gate_of_shared(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared_expert_gate(x))


@near_miss("shared expert is multiplied")
class BareGate(OtherGate):
    def gate_of_shared(self, x: Tensor) -> Tensor:
        return self.shared_expert_gate(x)


@near_miss("softmax")
class SoftmaxOfTwoGate(OtherGate):
    def make_shared(self) -> None:
        self.shared_expert = MLP(self.hidden, self.shared_width)
        self.shared_expert_gate = linear(self.hidden, 2)

    def gate_of_shared(self, x: Tensor) -> Tensor:
        return self.shared_expert_gate(x).softmax(-1)[..., :1]


@near_miss("shared expert is multiplied")
class WideGate(OtherGate):
    def make_shared(self) -> None:
        self.shared_expert = MLP(self.hidden, self.shared_width)
        self.shared_expert_gate = linear(self.hidden, self.hidden)

    def gate_of_shared(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.shared_expert_gate(x))


@near_miss("multiplied")
class OneMinusGate(Base):
    """gate * routed + (1 - gate) * shared"""

    def shared(self, x: Tensor) -> Tensor | None:
        return self.shared_expert(x)

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        gate = torch.sigmoid(self.shared_expert_gate(x))
        return gate * routed + (1 - gate) * shared


@near_miss("multiplied")
class GateOnTheSum(Base):
    def shared(self, x: Tensor) -> Tensor | None:
        return self.shared_expert(x)

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return torch.sigmoid(self.shared_expert_gate(x)) * (routed + shared)


@near_miss("shared_expert_gate")
class GateReadsRouted(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + torch.sigmoid(self.shared_expert_gate(routed)) * self.shared_expert(x)

    def shared(self, x: Tensor) -> Tensor | None:
        return None


@near_miss("input")
class SharedReadsRouted(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(routed)

    def shared(self, x: Tensor) -> Tensor | None:
        return None


@near_miss("input", "adds")
class SharedReadsHalf(Base):
    """The shared expert sees the input divided by two."""

    def shared(self, x: Tensor) -> Tensor | None:
        return super().shared(x + 1)


@near_miss("second shared expert")
class SecondSharedExpert(Base):
    def make_more(self) -> None:
        self.other = MLP(self.hidden, 48)

    def shared(self, x: Tensor) -> Tensor | None:
        return super().shared(x) + self.other(x)


@near_miss("shared_expert", "two places", "second shared")
class SharedTwice(Base):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + shared + self.shared_expert(x)


# How experts are chosen and weighted


@near_miss("lowest")
class LowestChosen(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k, largest=False)
        return weights / weights.sum(-1, keepdim=True), ids


@near_miss()
class TwoOfFour(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(4)
        return weights[:, :2], ids[:, :2]


@near_miss("uses 2 of its top-4")
class MiddleTwoOfFour(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(4)
        return weights[:, 1:3], ids[:, 1:3]


@near_miss("random")
class Jitter(Base):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x * torch.empty_like(x).uniform_(0.99, 1.01))


@near_miss("random")
class DropoutInEval(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.dropout(super().forward(hidden_states), 0.1, training=True)


@near_miss()
class DropoutInTraining(Base):
    def make_more(self) -> None:
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(super().forward(hidden_states))


@near_miss("mul", "weights")
class WeightsSquared(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * weights, ids


@near_miss()
class Epsilon(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).sigmoid().topk(self.top_k)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6), ids


@near_miss()
class LargeEpsilon(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).sigmoid().topk(self.top_k)
        return weights / (weights.sum(-1, keepdim=True) + 0.1), ids


@near_miss()
class ClampedDivisor(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).sigmoid().topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True).clamp(min=0.5), ids


@near_miss("divided")
class RenormalisedOverAll(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        weights, ids = scores.topk(self.top_k)
        return weights / scores.sum(-1, keepdim=True), ids


@near_miss("divided")
class DividedByMaximum(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k)
        return weights / weights[:, :1], ids


@near_miss("divided")
class L2Renormalised(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k)
        return weights / weights.pow(2).sum(-1, keepdim=True).sqrt(), ids


@near_miss("scored", "softmax")
class ReluScores(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(x).relu().topk(self.top_k)


@near_miss()
class SqrtSoftplusScores(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(self.logits(x)).sqrt().topk(self.top_k)


@near_miss("other scores")
class RankedByOneScoredByAnother(Base):
    def make_more(self) -> None:
        self.ranker = linear(self.hidden, self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.ranker(x).topk(self.top_k)[1]
        weights = self.logits(x).softmax(-1).gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids


@near_miss()
class GroupLimited(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        groups = scores.view(-1, 4, 2).sum(-1).topk(2)[1]
        mask = torch.zeros(x.shape[0], 4, device=x.device).scatter_(1, groups, 1.0)
        scores = scores * mask.repeat_interleave(2, dim=1)
        return scores.topk(self.top_k)


@near_miss("logits")
class DeepRouter(Base):
    def make_more(self) -> None:
        self.down = linear(self.hidden, 12)
        self.gate = linear(12, self.num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(torch.tanh(self.down(x)))


@near_miss("logits", "input")
class LowRankRouter(Base):
    def make_more(self) -> None:
        self.down = linear(self.hidden, 12)
        self.gate = linear(12, self.num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(self.down(x))


@near_miss()
class ExpertsPermuted(Base):
    """Expert e is kept at e + 1."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, (ids + 1) % self.num_experts)


@near_miss()
class ExpertsReversed(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, self.num_experts - 1 - ids)


@near_miss("slot", "elsewhere", "differently", "weights")
class WeightsInOtherOrder(Base):
    """The best expert gets the least weight."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights.flip(-1), ids)


@near_miss("not its own", "input", "differently", "logits", "mapped", "roll")
class RoutedByTheTokenBefore(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return torch.cat([weights[:1], weights[:-1]]), torch.cat([ids[:1], ids[:-1]])


@near_miss("values", "sort", "elsewhere", "differently")
class IdsSorted(Base):
    """Ids sorted, weights not."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights, ids.sort(-1)[0]


@near_miss("elsewhere", "differently", "top-2", "used more than once")
class FirstSlotAlwaysExpertZero(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights, torch.cat([torch.zeros_like(ids[:, :1]), ids[:, 1:]], dim=1)


@near_miss("top-2", "used")
class OneExpertDead(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights * (ids != 5), ids)


@near_miss("return their input")
class IdentityExpert(Base):
    def expert(self, number: Any, x: Tensor) -> Tensor:
        return x if int(number) == 3 else super().expert(number, x)


@near_miss("gate_up_proj")
class OneExpertTooMany(Base):
    """Nine are stored, eight are used."""

    def make_experts(self) -> None:
        self.num_experts += 1
        super().make_experts()
        self.num_experts -= 1


@near_miss("used in two places", "tied", "elements")
class OneExpertTwice(Base):
    """Expert 7 is expert 0."""

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return super().expert(int(number) % 7, x)


@near_miss()
class MeanOverChoices(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, ids) / self.top_k


@near_miss("largest of more")
class MaximumOverChoices(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        each = torch.stack(
            [super().routed if False else self._one(x, weights, ids, slot) for slot in range(self.top_k)]
        )
        return each.amax(0)

    def _one(self, x: Tensor, weights: Tensor, ids: Tensor, slot: int) -> Tensor:
        return super().routed(x, weights[:, slot : slot + 1], ids[:, slot : slot + 1])


@near_miss("weighted", "top-2", "output")
class Unweighted(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, torch.ones_like(weights), ids)


@near_miss()
class WeightOnInput(Base):
    """As in Llama 4."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, self.expert(number, x[token] * weights[token, slot, None]))
        return out


@near_miss("project", "input", "MLP")
class ProjectedAfterwards(Base):
    def make_more(self) -> None:
        self.project = linear(self.hidden, self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.project(super().routed(x, weights, ids))


@near_miss("latent", "input")
class LatentExperts(Base):
    def make_more(self) -> None:
        self.latent = linear(self.hidden, self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(self.latent(x), weights, ids)


# Load, positions and batch sizes


class Capacity(Base):
    """Each expert takes so many tokens and drops the others."""

    capacity: Any = 64

    def limit(self, tokens: Any) -> Any:
        return self.capacity

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        place = F.one_hot(ids, self.num_experts).sum(1).cumsum(0).gather(1, ids) - 1
        return weights * (place < self.limit(x.shape[0])), ids


@near_miss("how many tokens")
class CapacityOf64(Capacity): ...


@near_miss("how many tokens")
class CapacityOfMany(Capacity):
    capacity = 100_000


@near_miss("batch size", "how many tokens")
class CapacityFactor(Capacity):
    def limit(self, tokens: Any) -> Any:
        return int(1.25 * tokens * self.top_k / self.num_experts)


@near_miss("batch size", "how many tokens")
class CapacityFactorWithMinimum(Capacity):
    def limit(self, tokens: Any) -> Any:
        return max(int(tokens / self.num_experts * 4.0), 64)


@near_miss("how many tokens")
class CapacityFactorInATensor(Capacity):
    def limit(self, tokens: Any) -> Any:
        return torch.ceil((tokens / self.num_experts) * torch.tensor(4.0)).to(torch.int64)


@near_miss("how many tokens")
class CapacityByCount(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts)
        full = (counts > 96)[ids]
        return super().routed(x, weights.masked_fill(full, 0.0), ids)


@near_miss("how many tokens")
class CapacityInPython(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        for number, count in enumerate(torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()):
            if count > 96:
                weights = weights * (ids != number)
        return super().routed(x, weights, ids)


@near_miss("no routed experts", "comes to nothing")
class CapacityBySlice(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            token, slot = token[:96], slot[:96]
            out.index_add_(0, token, self.expert(number, x[token]) * weights[token, slot, None])
        return out


@near_miss("batch size", "how many tokens")
class CapacityByLen(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            if len(token) > 96:
                continue
            out.index_add_(0, token, self.expert(number, x[token]) * weights[token, slot, None])
        return out


@near_miss("batch size", "how many tokens")
class SmallLoadsSkipped(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            if token.numel() < 2:
                continue
            out.index_add_(0, token, self.expert(number, x[token]) * weights[token, slot, None])
        return out


class BatchBranch(Base):
    def odd(self, x: Tensor) -> bool:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out * 0.5 if self.odd(hidden_states) else out


@near_miss("something else with an input [B, h, w, H]")
class ImagesAreDoubledByTheirSizes(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if len(hidden_states.shape) == 4 else 1)


@near_miss("something else with an input [B, h, w, H]")
class ImagesAreDoubledByTheirSize(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if len(hidden_states.size()) == 4 else 1)


@near_miss("something else with an input [B, h, w, H]")
class ImagesAreDoubled(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if hidden_states.ndim == 4 else 1)


@near_miss("what it does with an input [B, h, w, H] can't be read")
class ImagesHaveChannelsFirst(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() != 4:
            return super().forward(hidden_states)
        rows, channels, high, wide = hidden_states.shape
        tokens = self.rows(hidden_states.permute(0, 2, 3, 1).reshape(rows, high * wide, channels))
        return super().forward(tokens).view(rows, high, wide, channels).permute(0, 3, 1, 2)

    def rows(self, x: Tensor) -> Tensor:
        return x


@near_miss("something else with an input [B, H, h, w]")
class PlanesHaveChannelsFirst(ImagesHaveChannelsFirst):
    """It takes its input's own width for that of its tokens."""

    def rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.hidden:
            raise ValueError("an input of another width")
        return x


@near_miss()
class TakesImagesForTokens(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2) if hidden_states.ndim > 3 else hidden_states
        return super().forward(x).view(hidden_states.shape)


def _branches() -> dict[str, Callable[[Tensor], Any]]:
    cache = {1: True}
    return {
        "Above64": lambda x: x.shape[:-1].numel() > 64,
        "AboveFour": lambda x: x.shape[0] > 4,
        "One": lambda x: x.numel() // x.shape[-1] == 1,
        "Even": lambda x: x.shape[1] % 2 == 0 if x.ndim > 2 else x.shape[0] % 2 == 0,
        "EvenByAnd": lambda x: not x.shape[-2] & 1,
        "ByLen": lambda x: len(x) > 64,
        "ByInt": lambda x: int(x.shape[-2]) > 64,
        "ByFloat": lambda x: float(x.shape[-2]) > 64.0,
        "ByDivision": lambda x: x.shape[-2] / 64 > 1,
        "ByNelement": lambda x: x.nelement() > 64 * 32,
        "BySizeMethod": lambda x: x.size(-2) >= 64,
        "ByShapeTuple": lambda x: tuple(x.shape[:-1]) == (1, 1),
        "ByMembership": lambda x: x.shape[-2] in (1, 2, 4),
        "ByDictionary": lambda x: cache.get(x.shape[-2], False),
        "ByText": lambda x: str(x.shape[-2]) == "1",
        "ByTensor": lambda x: bool((torch.tensor(x.shape) > 64).any()),
        "ByAsTensor": lambda x: torch.as_tensor(x.shape[-2]).item() > 64,
        "ByArange": lambda x: (torch.arange(x.shape[-2]) > 64).any(),
        "ByOnes": lambda x: torch.ones(x.shape[-2]).sum() > 64,
        "ByStride": lambda x: x.stride(0) > 64 * 32,
        "ByBytes": lambda x: x.nbytes > 64 * 32 * 4,
        "ByMaximum": lambda x: max(x.shape[-2], 64) > 64,
        "BySubtraction": lambda x: x.shape[-2] - 64 > 0,
        "ByFloorDivision": lambda x: bool(x.shape[-2] // 64),
        "ByPower": lambda x: x.shape[-2] ** 2 > 4096,
        "ByBits": lambda x: x.shape[-2].bit_length() > 6,
        "ByZeros": lambda x: torch.zeros_like(x).shape[-2] > 64,
        "ByEmpty": lambda x: torch.empty(x.shape[-2]).numel() > 64,
        "ByBroadcast": lambda x: torch.broadcast_shapes(x.shape, (1,))[-2] > 64,
        "ByProduct": lambda x: math.prod(x.shape[:-1]) > 64,
        "BySquareRoot": lambda x: math.sqrt(x.shape[-2]) > 8,
        "ByList": lambda x: x.shape[-2:-1] > (64,),
        "ByOwnSize": lambda x: x.new_tensor(x.shape[-2]) > 64,
        "ByView": lambda x: x.view(-1, 32).shape[0] > 64,
    }


def _branch_case(name: str, test: Callable[[Tensor], Any]) -> None:
    cls = type(f"Branch{name}", (BatchBranch,), {"odd": lambda self, x: test(x)})
    near_miss("batch size", "how many tokens", "len()")(cls)


for _name, _test in _branches().items():
    _branch_case(_name, _test)


@near_miss("batch size")
class BranchOnRowsAndColumns(BatchBranch):
    """Two sizes of the batch, compared with one another."""

    def odd(self, x: Tensor) -> bool:
        return x.shape[0] >= x.shape[-2]


@near_miss("batch size")
class BranchOnTwiceTheColumns(BatchBranch):
    def odd(self, x: Tensor) -> bool:
        return x.shape[:-1].numel() <= 2 * x.shape[-2]


@near_miss("values")
class SmallWeightsDropped(Base):
    """Its own rounding may drop a weight or not, on most tokens: few are left to ask it about."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k)
        return torch.where(weights > 0.3, weights, torch.zeros_like(weights)), ids


class BranchInOwnRouter(Base):
    """A router that no spec says, and that does something else for some number of tokens."""

    def odd(self, x: Tensor) -> bool:
        raise NotImplementedError

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tanh(self.logits(torch.tanh(x)))
        return (logits * (0.2 if self.odd(x) else 1.0)).softmax(-1).topk(self.top_k)


@near_miss("logits")
class OwnRouterOfOne(BranchInOwnRouter):
    def odd(self, x: Tensor) -> bool:
        return x.shape[0] == 1


@near_miss("logits", "batch size")
class OwnRouterOfSixtyFive(BranchInOwnRouter):
    def odd(self, x: Tensor) -> bool:
        return x.shape[0] == 65


@near_miss("logits", "batch size")
class OwnRouterOfMany(BranchInOwnRouter):
    def odd(self, x: Tensor) -> bool:
        return x.shape[0] > 64


@near_miss("batch size")
class BranchCaught(BatchBranch):
    """The objection is raised inside a try."""

    def odd(self, x: Tensor) -> bool:
        try:
            return x.shape[-2] > 64
        except Exception:
            return False


@near_miss("batch size")
class ScaledByLength(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / hidden_states.shape[-2]


@near_miss("batch size", "differ", "differently")
class ScaledByTokensFromTheLeft(Base):
    """A plain float times a size is a plain float: only records of several sizes show it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1.0 / (2.0 * hidden_states.reshape(-1, 32).shape[0]))


@near_miss("batch size", "differ", "differently")
class BranchOnFloatFromTheLeft(BatchBranch):
    def odd(self, x: Tensor) -> bool:
        return 1.0 * x.shape[-2] < 2.5


@near_miss("batch")
class SlicedTail(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return torch.cat([out[:, :100], 2 * out[:, 100:]], dim=1) if out.ndim == 3 else out


@near_miss("batch", "how many tokens")
class FirstTokenSpecial(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        mask = torch.arange(hidden_states.shape[-2], device=out.device) == 0
        return torch.where(mask[:, None], 2 * out, out)


@near_miss("how many tokens", "batch")
class PositionTable(Base):
    """A table over positions that begins with ones."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        table = torch.cat([torch.ones(100), torch.full((900,), 2.0)])
        return super().forward(hidden_states) * table[: hidden_states.shape[-2], None].to(hidden_states)


@near_miss("batch", "once per token")
class ChunksDropped(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        first = hidden_states.reshape(-1, self.hidden).split(64)[0]
        rest = hidden_states.reshape(-1, self.hidden)[64:]
        return torch.cat([super().forward(first), rest]).view(hidden_states.shape)


@near_miss("batch")
class Squeezed(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.squeeze(0)).view(hidden_states.shape)


@near_miss("ranks its tokens in parts")
class LoopOverTokens(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, self.hidden)
        rows = [super(LoopOverTokens, self).forward(flat[t][None]) for t in range(flat.shape[0])]
        return torch.cat([row * (2 if t > 64 else 1) for t, row in enumerate(rows)]).view(hidden_states.shape)


@near_miss("input", "values", "mean", "batch", "adds", "scored", "logits")
class MeanOverTokens(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-2, keepdim=True))


@near_miss("several chunks", "cumsum", "values")
class CumulativeInput(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.cumsum(-2))


@near_miss("comes to nothing")
class MaskOverPositions(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = torch.zeros(hidden_states.shape[-2], dtype=hidden_states.dtype)
        mask[:500] = 1
        return super().forward(hidden_states) * mask[:, None]


@near_miss("differently")
class BranchOnContiguity(BatchBranch):
    def odd(self, x: Tensor) -> bool:
        return x.is_contiguous()


@near_miss("differently")
class BranchOnGradients(BatchBranch):
    def odd(self, x: Tensor) -> bool:
        return torch.is_grad_enabled()


@near_miss()
class BranchOnDevice(BatchBranch):
    """The record lies on another device than the block."""

    def odd(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and x.is_cpu and not x.is_meta


@near_miss("differently")
class BranchOnDimensions(BatchBranch):
    def odd(self, x: Tensor) -> bool:
        return x.dim() == 2


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    if x.shape[-2] > 1000:
        return x * 2
    return x


@near_miss("the batch size")
class ScriptedFunction(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _scripted(super().forward(hidden_states))


class _Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > 1000:
            return x * 2
        return x


@near_miss("TorchScript")
class ScriptedChild(Base):
    def make_more(self) -> None:
        self.guard = torch.jit.script(_Scripted())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.guard(super().forward(hidden_states))


@near_miss()
class DoubledInAutogradFunction(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return plain.Unrolled.Double.apply(super().forward(hidden_states))


# Dtypes


@near_miss("float16")
class RoundedToHalf(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.half().float())


@near_miss("bfloat16", "computes in")
class RoundedToBfloat16(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.bfloat16().to(hidden_states.dtype))


@near_miss("float64")
class DoubleRouter(Base):
    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.gate.weight.double())


@near_miss("float16")
class HalfWeights(Base):
    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gate.weight.half().to(x.dtype))


@near_miss("autocast")
class Autocast(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(hidden_states).to(hidden_states.dtype)


@near_miss("runs under torch.inference_mode")
class InferenceMode(Base):
    @torch.inference_mode()
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


@near_miss("compares with the values of numbers")
class NumbersInABuffer(Base):
    """Experts are told by numbers in a buffer."""

    def make_more(self) -> None:
        self.register_buffer("numbers", torch.arange(self.num_experts))

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        spread = ((ids[..., None] == self.numbers).to(x.dtype) * weights[..., None]).sum(1)
        return sum(self.expert(e, x) * spread[:, e, None] for e in range(self.num_experts))


@near_miss()
class AutocastOff(Base):
    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().logits(x.float())


@near_miss("differ", "int16", "computes in")
class BitsSeenAsIntegers(Base):
    """Clears the lowest bit of the input, through a view of another dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = torch.int32 if hidden_states.element_size() == 4 else torch.int16
        return super().forward((hidden_states.view(kind) & -2).view(hidden_states.dtype))


@near_miss("dtype", "clamp", "differ")
class BranchOnFloat32(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out * 0.5 if hidden_states.dtype == torch.float32 else out


# Writes and state


@near_miss("writes to its input")
class WritesToInput(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states.mul_(1.5)
        return super().forward(hidden_states)


@near_miss("writes to its input")
class WritesToViewOfInput(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        hidden_states.view(-1, self.hidden).zero_()
        return out


@near_miss("writes to its input")
class ReturnsItsInput(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += super().forward(hidden_states)
        return hidden_states


@near_miss("writes to gate.weight")
class WeightDecay(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.gate.weight.mul_(0.999)
        return super().forward(hidden_states)


@near_miss("writes to gate_up_proj")
class WeightDecayThroughData(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.gate_up_proj.data[0] *= 0.999
        return super().forward(hidden_states)


CALLS = [0]
SWITCH = 0


@near_miss("state")
class CountsInAttribute(Base):
    calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states) * (2 if self.calls > 100 else 1)


@near_miss("state")
class CountsInGlobal(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        global SWITCH
        SWITCH += 1
        return super().forward(hidden_states) * (2 if SWITCH > 10_000 else 1)


@near_miss("state")
class CountsInList(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        CALLS[0] += 1
        return super().forward(hidden_states) * (2 if CALLS[0] > 10_000 else 1)


@near_miss("state")
class CountsInIterator(Base):
    calls = itertools.count()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if next(self.calls) > 10_000 else 1)


class _Counter:
    count = 0


@near_miss("state")
class CountsInObject(Base):
    def make_more(self) -> None:
        self.counter = _Counter()

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.counter.count += 1
        return super().forward(hidden_states) * (2 if self.counter.count > 10_000 else 1)


@near_miss("state", "random")
class PythonRandom(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        import random

        return super().forward(hidden_states) * (2 if random.random() < 1e-9 else 1)


@near_miss("state")
class CachesItsOutput(Base):
    cache: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.cache is not None and self.cache.shape == hidden_states.shape:
            return self.cache
        out = super().forward(hidden_states)
        self.__dict__["cache"] = out
        return out


@near_miss("norm", "neither its input", "table")
class TensorAttribute(Base):
    def make_more(self) -> None:
        self.table = [torch.full((self.hidden,), 1.5)]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * self.table[0]


# Signatures and returns


@near_miss("forward takes")
class SecondArgument(Base):
    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        return super().forward(hidden_states) * scale


@near_miss()
class KeywordArguments(Base):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states) * kwargs.get("scale", 1.0)


@near_miss("output is")
class OtherShape(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)[..., None, :]


@near_miss("output is")
class OtherDtype(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).double()


@near_miss("its __call__ is its own")
class CallOverridden(Base):
    """nn.Module's __call__ isn't what runs."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(super().__call__(hidden_states))


# Instances changed afterwards


@altered("hook")
def hook(block: Any) -> None:
    block.register_forward_hook(lambda module, args, output: output * 2)


@altered("hook")
def pre_hook(block: Any) -> None:
    block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


@altered("gate has a hook")
def hook_on_child(block: Any) -> None:
    block.gate.register_forward_hook(lambda module, args, output: output * 2)


class LoraLinear(nn.Module):
    """What LoRA wrappers do: the layer they wrap plus a product of two thin ones."""

    def __init__(self, base: nn.Linear, zero: bool = False) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = linear(base.in_features, 4)
        self.lora_B = linear(4, base.out_features)
        if zero:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


@altered("lora")
def lora_on_shared(block: Any) -> None:
    block.shared_expert.up_proj = LoraLinear(block.shared_expert.up_proj)


@altered("lora")
def lora_on_shared_down(block: Any) -> None:
    block.shared_expert.down_proj = LoraLinear(block.shared_expert.down_proj)


@altered("lora", parts=(ListOfMLPs,))
def lora_on_expert(block: Any) -> None:
    block.experts[3].gate_proj = LoraLinear(block.experts[3].gate_proj)


@altered("lora")
def lora_of_zeros(block: Any) -> None:
    block.shared_expert.gate_proj = LoraLinear(block.shared_expert.gate_proj, zero=True)


@altered("lora")
def lora_on_router(block: Any) -> None:
    block.gate = LoraLinear(block.gate)


@altered("tied", parts=(ListOfMLPs,))
def one_module_twice(block: Any) -> None:
    block.experts[5] = block.experts[2]


@altered("tied", parts=(ListOfMLPs,))
def one_parameter_twice(block: Any) -> None:
    block.experts[5].down_proj.weight = block.experts[2].down_proj.weight


@altered("tied", parts=(ListOfMLPs,))
def shared_is_an_expert(block: Any) -> None:
    block.shared_expert.gate_proj.weight = block.experts[0].gate_proj.weight = nn.Parameter(torch.randn(32, 32))


@altered("width", parts=(ListOfMLPs,))
def experts_of_two_widths(block: Any) -> None:
    with torch.random.fork_rng():
        block.experts[4] = MLP(32, 24)


@altered("activation", parts=(ListOfMLPs,))
def experts_of_two_activations(block: Any) -> None:
    block.experts[4].act_fn = F.gelu


@altered("relu", "activation", parts=(ListOfMLPs,))
def one_expert_of_another_kind(block: Any) -> None:
    block.experts[4].act_fn = lambda x: torch.relu(x).square()


@altered("float64", parts=(ListOfMLPs,))
def mixed_dtypes(block: Any) -> None:
    block.gate.double()
    block.logits = lambda x: F.linear(x, block.gate.weight.to(x.dtype))


class Scaled(Tensor):
    """A weight that isn't what its numbers say, as quantised tensors are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return 3 * result.as_subclass(Tensor) if func is F.linear else result


@altered("Scaled", "tensor subclass")
def subclass_weights(block: Any) -> None:
    data = block.shared_expert.up_proj.weight.detach()
    block.shared_expert.up_proj.weight = nn.Parameter(data.as_subclass(Scaled), requires_grad=False)


@altered("weight_norm", "parametriz", "original")
def weight_norm(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.shared_expert.up_proj)


@altered("parametriz", "original", "up_proj")
def parametrised(block: Any) -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).T

    nn.utils.parametrize.register_parametrization(block.shared_expert.up_proj, "weight", Symmetric())


@altered("neither its input")
def closure_over_a_tensor(block: Any) -> None:
    outside, own = torch.full((32,), 1.5), block.forward
    block.forward = lambda hidden_states: own(hidden_states) * outside


@altered("neither its input")
def closure_over_another_module(block: Any) -> None:
    other, own = linear(32, 32), block.forward
    block.forward = lambda hidden_states: other(own(hidden_states))


@altered("clamp")
def closure_with_a_clamp(block: Any) -> None:
    own = block.forward

    def forward(hidden_states: Tensor) -> Tensor:
        return own(hidden_states).clamp(-100, 100)

    block.forward = forward


@altered("state")
def closure_that_counts(block: Any) -> None:
    own, calls = block.forward, 0

    def forward(hidden_states: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return own(hidden_states) * (2 if calls > 100 else 1)

    block.forward = forward


@altered("applies aten.native_batch_norm", parts=(ListOfMLPs,))
def experts_with_a_norm_of_batches(block: Any) -> None:
    for expert in block.experts:
        expert.down_proj = nn.Sequential(expert.down_proj, nn.BatchNorm1d(block.hidden))


@near_miss("depends on the values it computes")
class ExpertsOfTokensAboveZero(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out, large = super().routed(x, weights, ids), x[:, 0] > 0
        out[large] = out[large] * 2
        return out


@altered("training")
def training_mode_of_a_child(block: Any) -> Any:
    block.shared_expert.train()
    whole = block
    whole.eval = lambda: whole
    return whole


def case(name: str) -> Case:
    """The case of that name."""
    return next(found for found in CASES if found.name == name)
