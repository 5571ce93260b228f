"""Blocks as other people write them, by kind: what they return, take, keep, and how they spell the same computation.

Those with ``words`` are near misses of the same kind: they must be left alone, and the reason must name one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import plain
from .plain import Base, ListOfMLPs, OneHotLoop, block_class

LISTED = (ListOfMLPs, OneHotLoop)


@dataclass(frozen=True)
class Case:
    """One block of a ``kind``. ``at`` is the site's path in the block, "" for the block itself."""

    kind: str
    name: str
    make: Callable[[], nn.Module]
    words: tuple[str, ...] = ()
    at: str = ""
    shaped: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


CASES: list[Case] = []


def block(kind: str, *words: str, parts: tuple[type[Base], ...] = LISTED, at: str = "", shaped: bool = True) -> Any:
    """Register a class that overrides part of the plain block with a list of experts."""

    def register(cls: type[Base]) -> type[Base]:
        whole = block_class(cls, *parts, name=cls.__name__)
        CASES.append(Case(kind, cls.__name__, lambda: plain.make(whole), words, at, shaped))
        return cls

    return register


def module(kind: str, *words: str, at: str = "", shaped: bool = True) -> Any:
    """Register a module that is no variation of the plain block."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES.append(Case(kind, cls.__name__, lambda: plain.make(cls), words, at, shaped))
        return cls

    return register


# Other results than one tensor

RESULTS = "results"


@block(RESULTS)
class WithLogits(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states.reshape(-1, self.hidden))


@block(RESULTS)
class WithBatchedLogits(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states)


@block(RESULTS)
class WithLogitsAndIds(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        out = self.combine(x, self.routed(x, weights, ids), self.shared(x)).reshape(hidden_states.shape)
        return out, (self.logits(x), ids)


@block(RESULTS)
class WithAllOfTheRouter(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.gate(x)
        scores = logits.softmax(-1, dtype=torch.float32)
        raw, ids = scores.topk(self.top_k, dim=-1)
        weights = raw / raw.sum(-1, keepdim=True)
        dense = torch.zeros_like(scores).scatter(1, ids, weights)
        out = self.combine(x, self.routed(x, weights.to(x.dtype), ids), self.shared(x)).reshape(hidden_states.shape)
        return [out, logits, scores, weights, raw, dense, ids]


Named = namedtuple("Named", ["hidden_states", "router_logits", "aux_loss"])


@block(RESULTS)
class AsNamedTuple(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return Named(super().forward(hidden_states), self.logits(hidden_states).float(), None)


@dataclasses.dataclass
class Answer:
    aux_loss: Any
    last: Tensor


@block(RESULTS)
class AsDataclass(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return Answer(hidden_states.new_zeros(()), super().forward(hidden_states))


@block(RESULTS)
class AsDict(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return {"out": super().forward(hidden_states), "loss": 0.0, "kept": True}


@block(RESULTS)
class WithLoads(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        _, ids = self.route(hidden_states.reshape(-1, self.hidden))
        return super().forward(hidden_states), {"loads": torch.bincount(ids.flatten(), minlength=self.num_experts)}


@block(RESULTS, "its output is of another width than its input: 48, not 32")
class OfAnotherWidth(Base):
    """A projector between two models."""

    def make_more(self) -> None:
        self.wider = plain.linear(self.hidden, 48)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.wider(super().forward(hidden_states))


@block(RESULTS)
class WithItsExpectedLoad(Base):
    """How many tokens each expert, and each of three, would get: parts of a number of tokens."""

    def forward(self, hidden_states: Tensor) -> Any:
        tokens = hidden_states.reshape(-1, self.hidden).shape[0]
        expected = {"each": tokens * self.top_k / self.num_experts, "of three": tokens / 3, "half": 0.5}
        return super().forward(hidden_states), expected


@block(RESULTS)
class WithMeanOfLogits(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states).mean()


@block(RESULTS)
class WithItsOneScoreAndExpert(Base):
    """Its weights are a maximum, of which another operation finds the place; its scores are made in float32."""

    def forward(self, hidden_states: Tensor) -> Any:
        scores = self.gate(hidden_states).float().softmax(-1).to(hidden_states.dtype)
        ids, out = scores.argmax(-1), hidden_states.clone()
        for number in range(self.num_experts):
            out[ids == number] = self.expert(number, hidden_states[ids == number])
        return scores.max(-1).values[..., None] * out + self.shared(hidden_states), (scores, ids)


@block(RESULTS)
class WithTheHiddenStates(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), hidden_states


@block(RESULTS)
class WithIdsMadeOfIds(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        out = self.combine(x, self.routed(x, weights, ids), self.shared(x)).reshape(hidden_states.shape)
        return out, ids + 1


@block(RESULTS)
class WithLogitsOfAnotherRouter(Base):
    def make_more(self) -> None:
        self.other = plain.linear(self.hidden, self.num_experts)

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.other(hidden_states)


@block(RESULTS, "(1)")
class WithAnObject(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), object()


@block(RESULTS, "for one batch", "batch size")
class TupleForMany(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states)
        return (out, None) if hidden_states.ndim == 2 else out


@block(RESULTS, "as tokens for one batch")
class FlatForSeveralRows(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states)
        return out.reshape(-1, self.hidden) if len(hidden_states) > 1 else out


# Arguments beside the input

ARGUMENTS = "arguments"


@block(ARGUMENTS)
class Optional(Base):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        out = super().forward(hidden_states)
        return out if attention_mask is None else out * attention_mask


@block(ARGUMENTS)
class Gathering(Base):
    def forward(self, hidden_states: Tensor, *more: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        out = super().forward(hidden_states, *more, **kwargs)
        return out * scale


@block(ARGUMENTS)
class Unused(Base):
    def forward(self, hidden_states: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states)


@block(ARGUMENTS)
class PassedOn(Base):
    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.chosen(x, input_ids) if input_ids is not None else self.chosen(x)
        return self.combine(x, self.routed(x, weights, ids), self.shared(x)).reshape(hidden_states.shape)

    def chosen(self, x: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.route(x)


class NeedsIds(Base):
    """Token ids, which most layers are called without (DeepSeek-V4)."""

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None) -> Any:
        out = super().forward(hidden_states)
        return out if input_ids is None else out * input_ids.reshape(*hidden_states.shape[:-1], 1)


@block(ARGUMENTS, "batch size")
class Varied(Base):
    def forward(self, hidden_states: Tensor, *, batch_size: int | None = None) -> Any:
        return super().forward(hidden_states) * (batch_size or len(hidden_states))


class _Experts(nn.Module):
    keeps = False

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(plain.MLP(sizes.hidden, sizes.width) for _ in range(sizes.experts))

    def forward(self, x: Tensor, scores: Tensor, top_weights: Tensor, top_experts: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for number, mlp in enumerate(self.mlps):
            rows, slots = torch.where(top_experts == number)
            out.index_add_(0, rows, mlp(flat[rows]) * top_weights[rows, slots, None])
        if self.keeps:
            self.last = out
        return out.reshape(x.shape)


@module(ARGUMENTS, at="experts")
class ExpertsThatAreToldMore(nn.Module):
    """The block's scores can't be read; its experts take scores that they never look at, and weights before ids."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate, self.experts = plain.linear(sizes.hidden, sizes.experts), _Experts(sizes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = F.elu(self.gate(x))
        weights, ids = scores.topk(2, dim=-1)
        return self.experts(x, scores, weights, ids).reshape(hidden_states.shape)


@module(ARGUMENTS, "its experts write to last in every call")
class ExpertsThatKeepWhatTheyMade(ExpertsThatAreToldMore):
    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__(sizes)
        self.experts.keeps = True


# Where experts are kept

PLACES = "places"


class _Kept(nn.Module):
    """A router, and experts that ``expert`` finds."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.sizes = (sizes.experts, sizes.hidden, sizes.width)
        self.store(*self.sizes)

    def store(self, experts: int, hidden: int, width: int) -> None:
        raise NotImplementedError

    def expert(self, number: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number in range(self.sizes[0]):
            rows, slots = torch.where(ids == number)
            out.index_add_(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
        return out.reshape(hidden_states.shape)


@module(PLACES)
class AsAttributes(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        for number in range(experts):
            setattr(self, f"ffn{number}", plain.MLP(hidden, width))

    def expert(self, number: int, x: Tensor) -> Tensor:
        return getattr(self, f"ffn{number}")(x)


@module(PLACES)
class InASequential(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        self.ffns = nn.Sequential(*(plain.MLP(hidden, width) for _ in range(experts)))

    def expert(self, number: int, x: Tensor) -> Tensor:
        return self.ffns[number](x)


@module(PLACES)
class InAModuleDict(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        self.bank = nn.ModuleDict({f"e{number}": plain.MLP(hidden, width) for number in range(experts)})

    def expert(self, number: int, x: Tensor) -> Tensor:
        return self.bank[f"e{number}"](x)


@module(PLACES)
class InParameterLists(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        def listed(*shape: int) -> nn.ParameterList:
            return nn.ParameterList([plain.parameter(*shape) for _ in range(experts)])

        self.w1, self.w3, self.w2 = listed(width, hidden), listed(width, hidden), listed(hidden, width)

    def expert(self, number: int, x: Tensor) -> Tensor:
        mixed = F.silu(F.linear(x, self.w1[number])) * F.linear(x, self.w3[number])
        return F.linear(mixed, self.w2[number])


@module(PLACES)
class OneStackPerChild(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        for name, shape in (("up", (hidden, width)), ("act", (hidden, width)), ("down", (width, hidden))):
            setattr(self, name, nn.ParameterDict({"weight": plain.parameter(experts, *shape)}))

    def expert(self, number: int, x: Tensor) -> Tensor:
        up, act, down = (getattr(self, name)["weight"][number] for name in ("up", "act", "down"))
        return (F.silu(x @ act) * (x @ up)) @ down


@module(PLACES)
class OneStackForAll(_Kept):
    def store(self, experts: int, hidden: int, width: int) -> None:
        self.w = plain.parameter(experts, 3 * width, hidden)

    def expert(self, number: int, x: Tensor) -> Tensor:
        act, up, down = self.w[number].chunk(3)
        return (F.silu(x @ act.t()) * (x @ up.t())) @ down


@module(PLACES)
class TwoLevelsDown(nn.Module):
    """The router lies two modules above the list, whatever it is called."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.router, self.ffn = plain.linear(sizes.hidden, sizes.experts), _Experts(sizes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores = self.router(hidden_states.reshape(-1, hidden_states.shape[-1])).softmax(-1)
        weights, ids = scores.topk(2, dim=-1)
        return self.ffn(hidden_states, scores, weights, ids)


@module(PLACES)
class OneWideLayer(nn.Module):
    """Experts are slices of one MLP, and weights stand inside it."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate, wide = plain.linear(sizes.hidden, sizes.experts), sizes.experts * sizes.width
        self.w1, self.w3 = plain.linear(sizes.hidden, wide), plain.linear(sizes.hidden, wide)
        self.w2 = plain.linear(wide, sizes.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        dense = torch.zeros(x.shape[0], self.gate.out_features, dtype=x.dtype).scatter(1, ids, weights)
        mixed = (F.silu(self.w1(x)) * self.w3(x)).unflatten(-1, (dense.shape[1], -1)) * dense[..., None]
        return self.w2(mixed.flatten(-2)).reshape(hidden_states.shape)


@module(PLACES, "input of a linear map")
class OneWideLayerOfUnequalShares(OneWideLayer):
    """Its weights stand before hidden elements that aren't those of one expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        dense = torch.zeros(x.shape[0], self.gate.out_features, dtype=x.dtype).scatter(1, ids, weights)
        mixed = (F.silu(self.w1(x)) * self.w3(x)).unflatten(-1, (-1, dense.shape[1])) * dense[:, None]
        return self.w2(mixed.flatten(-2)).reshape(hidden_states.shape)


@module(PLACES)
class TwoTensorsOfRows(nn.Module):
    """As nomic-embed stores them, and no name says experts."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.w1, self.w2 = (plain.parameter(sizes.experts * sizes.width, sizes.hidden) for _ in range(2))
        self.bias = plain.parameter(sizes.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, count = hidden_states.reshape(-1, hidden_states.shape[-1]), self.gate.out_features
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number in range(count):
            rows, slots = torch.where(ids == number)
            first, last = (weight.view(count, -1, x.shape[-1])[number] for weight in (self.w1, self.w2))
            out.index_add_(0, rows, F.gelu(x[rows] @ first.t()) @ last * weights[rows, slots, None])
        return out.reshape(hidden_states.shape) + self.bias


@module(PLACES)
class GatheredMatrices(nn.Module):
    """Each token's matrices are gathered, rows of gate and up alternate, and a residual is added (gpt-oss in torch)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(sizes.hidden), nn.Linear(sizes.hidden, sizes.experts)
        self.first = plain.parameter(sizes.experts, 2 * sizes.width, sizes.hidden)
        self.first_bias = plain.parameter(sizes.experts, 2 * sizes.width)
        self.last = plain.parameter(sizes.experts, sizes.hidden, sizes.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        normed = self.norm(x)
        weights, ids = self.gate(normed).topk(2, dim=-1)
        both = torch.einsum("tkjh,th->tkj", self.first[ids], normed) + self.first_bias[ids]
        mixed = F.silu(both[..., ::2]) * both[..., 1::2]
        out = torch.einsum("tkhi,tki->tkh", self.last[ids], mixed)
        return (x + torch.einsum("tkh,tk->th", out, weights.softmax(-1))).reshape(hidden_states.shape)


@module(PLACES)
class SwitchingByMaximum(nn.Module):
    """Top-1 of experts without gates or biases, written over a copy of the input; ids are returned."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.experts = nn.ModuleList(
            nn.Sequential(plain.linear(sizes.hidden, sizes.width), nn.ReLU(), plain.linear(sizes.width, sizes.hidden))
            for _ in range(sizes.experts)
        )

    def forward(self, hidden_states: Tensor) -> Any:
        probs = self.gate(hidden_states).softmax(-1)
        chosen = F.one_hot(probs.argmax(-1), len(self.experts))
        out = hidden_states.clone()
        for number, expert in enumerate(self.experts):
            mine = chosen[..., number].bool()
            out[mine] = expert(hidden_states[mine])
        return probs.amax(-1, keepdim=True) * out, chosen.argmax(-1)


# State that is written and never read

STATE = "state"


@block(STATE)
class WritesZero(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.aux_loss = hidden_states.new_zeros(())
        self.calls_counted = False
        return super().forward(hidden_states)


@block(STATE)
class RemembersItsChoice(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.last = self.route(hidden_states.reshape(-1, self.hidden))[1]
        return super().forward(hidden_states)


@block(STATE)
class RemembersItsLoss(Base):
    """A loss that balances loads, for others to read."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        share = F.one_hot(ids, self.num_experts).float().mean((0, 1))
        self.aux_loss = (share * self.logits(x).softmax(-1).mean(0)).sum() * self.num_experts
        return weights, ids


@block(STATE)
class ItsRouterRemembers(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        self.gate.last_logits = self.logits(x)
        return weights, ids


@block(STATE, "which is its experts'")
class RemembersItsOutput(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        self.last = out * 2
        return out


@block(STATE)
class CountsInABuffer(Base):
    def make_more(self) -> None:
        self.register_buffer("loads", torch.zeros(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        self.loads += F.one_hot(ids, self.num_experts).sum((0, 1))
        return weights, ids


@block(STATE)
class CountsInTraining(Base):
    """Whole numbers, written in training only."""

    def make_more(self) -> None:
        self.register_buffer("loads", torch.zeros(self.num_experts, dtype=torch.long))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        if self.training:
            self.loads += ids.flatten().bincount(minlength=self.num_experts)
        return weights, ids


@block(STATE)
class StatisticsOfTheLoad(Base):
    """A loss that balances loads, of which nothing comes."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        share = F.one_hot(ids, self.num_experts).float().mean(0)
        self.balance(share * self.logits(x).softmax(-1).mean(0))
        return weights, ids

    def balance(self, shares: Tensor) -> Tensor:
        return shares.sum() * self.num_experts


@block(STATE, "how many tokens")
class StatisticsThatScale(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        _, ids = self.route(hidden_states.reshape(-1, self.hidden))
        return super().forward(hidden_states) * F.one_hot(ids, self.num_experts).float().mean((0, 1)).max()


@block(STATE, "seen")
class Counts(Base):
    seen = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(hidden_states)


@block(STATE, "state")
class ReadsWhatItWrote(Base):
    first = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        out = out if self.first else 2 * out
        self.first = False
        return out


# Activations that are spelled out

ACTIVATIONS = "activations"


def _acts(name: str, act: Callable[[Tensor], Tensor], *words: str) -> None:
    """Register two blocks with an activation, of gated experts and of others."""

    def act_of(self: Base, x: Tensor) -> Tensor:
        return act(x)

    class Ungated(plain.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(act(self.up_proj(x)))

    class Alone(Base):
        def make_experts(self) -> None:
            self.experts = nn.ModuleList(Ungated(self.hidden, self.width) for _ in range(self.num_experts))
            for expert in self.experts:
                del expert.gate_proj

    block(ACTIVATIONS, *words)(type(f"By{name}", (Base,), {"act": act_of}))
    block(ACTIVATIONS, *words)(type(f"By{name}Alone", (Alone,), {}))


_acts("Mish", F.mish)
_acts("MishSpelledOut", lambda x: x * torch.tanh(F.softplus(x)))
_acts("Hardswish", F.hardswish)
_acts("Elu", F.elu)
_acts("LeakyRelu", F.leaky_relu)
_acts("Relu6", F.relu6)
_acts("Tanh", torch.tanh)
_acts("Sigmoid", torch.sigmoid)
_acts("EluOfTwo", lambda x: F.elu(x, 2.0), "elu 2(")
_acts("SteepLeakyRelu", lambda x: F.leaky_relu(x, 0.2), "leaky_relu 0.2(")
_acts("Hardtanh", F.hardtanh, "hardtanh -1 1(")
_acts("OtherMish", lambda x: x * torch.tanh(F.softplus(x, 2.0)), "softplus 2(")
_acts("TanhOfSoftplus", lambda x: torch.tanh(F.softplus(x)), "softplus(")
_acts("Softplus", F.softplus, "softplus(")


@block(ACTIVATIONS)
class GeluByErf(Base):
    def act(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


@block(ACTIVATIONS)
class GeluByTanh(Base):
    def act(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@block(ACTIVATIONS)
class GeluByTanhFactored(Base):
    def act(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


@block(ACTIVATIONS, "not down(act(gate(x)) * up(x))")
class NearlyGelu(Base):
    def act(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.05 * torch.pow(x, 3.0))))


# Routers that no spec says, in front of a loop over experts

ROUTERS = "routers"


@block(ROUTERS)
class ByCosine(Base):
    def make_more(self) -> None:
        self.temperature = nn.Parameter(torch.ones(1))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alike = F.normalize(x, dim=-1) @ F.normalize(self.gate.weight, dim=-1).t()
        return (alike * self.temperature.exp().clamp(max=20.0)).softmax(-1).topk(self.top_k, dim=-1)


@block(ROUTERS)
class CappedAtSizesOfBatches(Base):
    """Its caps are sizes of the batches that blocks are read with, and aren't taken for them."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        capped = sum(logits.clamp(-size, size) for size in (3, 5, 7, 11, 13, 15, 35, 77))
        return capped.softmax(-1).topk(self.top_k, dim=-1)


@block(ROUTERS)
class WithoutSomeExperts(Base):
    """A mask says which experts may not be chosen; at present they all may."""

    def make_more(self) -> None:
        self.register_buffer("dropped", torch.zeros(self.num_experts, dtype=torch.bool))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(x).masked_fill(self.dropped, -torch.inf).softmax(-1).topk(self.top_k, dim=-1)


@block(ROUTERS)
class UpToAShareOfTheScores(Base):
    """It takes as many as have a share of the scores together; the others have no weight."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = self.logits(x).softmax(-1).sort(dim=-1, descending=True)
        weights = scores * (scores.cumsum(-1) - scores < 0.7)
        return weights / weights.sum(-1, keepdim=True), ids


@block(ROUTERS)
class SomeChoicesAreNone(Base):
    """Half of what it chooses among are no experts, and have no weight."""

    def make_router(self) -> None:
        self.gate = plain.linear(self.hidden, 2 * self.num_experts)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, slots = torch.where(ids == number)
            out.index_add_(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).topk(2 * self.top_k, dim=-1)
        weights = weights.masked_fill(ids >= self.num_experts, 0.0)
        return weights / (weights.sum(-1, keepdim=True) + 1e-9), ids


@block(ROUTERS)
class FavoursSomeExperts(Base):
    """It writes to a part of a part of what it adds to its logits."""

    def logits(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        more = torch.zeros_like(logits)
        more[:, 2:][:, ::3] = 0.25
        more[:, 1].add_(0.5)
        return logits + more


@block(ROUTERS, "treats tokens or batches differently")
class FirstOfEachHalf(Base):
    """Each half of its experts has a choice of its own, which no one split of the block can give."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.num_experts // 2
        first, second = (part.softmax(-1).max(-1) for part in self.logits(x).split(half, dim=-1))
        ids = torch.stack([first.indices, second.indices + half], -1)
        return torch.stack([first.values, second.values], -1), ids


@block(ROUTERS)
class ByAnMLP(Base):
    def make_more(self) -> None:
        self.norm, self.first = nn.LayerNorm(self.hidden), plain.linear(self.hidden, self.hidden)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = self.gate(torch.tanh(self.first(self.norm(x)))).topk(self.top_k, dim=-1)
        return best.softmax(-1), ids


@block(ROUTERS)
class ByAttentionBetweenExperts(Base):
    """Its product of [T, E, E] ends in as many numbers as there are experts, and isn't the logits."""

    def make_more(self) -> None:
        del self.gate
        self.attention = plain.linear(self.hidden, 3 * self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.attention(x).chunk(3, -1)
        mixed = torch.matmul(query[..., None], key[:, None]).softmax(-1)
        best, ids = torch.matmul(mixed, value[..., None]).squeeze(-1).topk(self.top_k, dim=-1)
        return best.softmax(-1), ids


@block(ROUTERS)
class ScaledByExpert(Base):
    def make_more(self) -> None:
        self.scales = nn.Parameter(torch.ones(self.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * self.scales[ids], ids


@block(ROUTERS)
class BiasInTheWeights(Base):
    """Its logits are returned too, and the sum of its weights is kept."""

    def make_more(self) -> None:
        self.register_buffer("bias", torch.full((self.num_experts,), 0.1))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (self.logits(x).softmax(-1) + self.bias).topk(self.top_k, dim=-1)
        self.total = weights.sum()
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states)


@block(ROUTERS)
class InGroupsOfItsOwn(Base):
    """The best group counts twice."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid().view(x.shape[0], -1, 2)
        best = scores.amax(-1).topk(2, dim=-1).indices
        factor = torch.zeros(scores.shape[:-1], dtype=x.dtype).scatter(1, best, 1.0).scatter(1, best[:, :1], 2.0)
        return (scores * factor[..., None]).flatten(1).topk(self.top_k, dim=-1)


@block(ROUTERS)
class OneAfterTheOther(Base):
    """The second expert is the best of the others; scores far below the best count as none."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, weights, ids = self.logits(x), [], []
        for _ in range(self.top_k):
            best, first = scores.max(-1, keepdim=True)
            far = (best - scores) / scores.abs().clamp(min=best) > 0.5
            weights.append(scores.masked_fill(far, -torch.inf).softmax(-1).gather(-1, first))
            ids.append(first)
            scores = scores.scatter(-1, first, -torch.inf)
        return torch.cat(weights, -1), torch.cat(ids, -1)


@block(ROUTERS)
class RoundsInItsOwnDtypeOnly(Base):
    """In half precision its weights would make its output float32."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).float().softmax(-1).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = x.new_zeros(x.shape, dtype=weights.dtype)
        for number in range(len(self.experts)):
            rows, slots = torch.where(ids == number)
            out = out.index_add(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
        return out


@block(ROUTERS, "scored by", "other tokens")
class Balanced(Base):
    """Sinkhorn's: every token's weights depend on those of all others."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cost = self.logits(x).exp()
        for _ in range(3):
            cost = cost / cost.sum(0, keepdim=True)
            cost = cost / cost.sum(1, keepdim=True)
        return cost.topk(self.top_k, dim=-1)


@block(ROUTERS, "values it computes")
class ByThreshold(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        scores, out = self.logits(x).softmax(-1), torch.zeros_like(x)
        for number in range(len(self.experts)):
            rows = torch.where(scores[:, number] > 0.2)[0]
            out = out.index_add(0, rows, self.expert(number, x[rows]) * scores[rows, number, None])
        return out


# Blocks that take tokens [T, H] only


@block("flat", shaped=False)
class TokensOnly(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens, width = hidden_states.shape
        weights, ids = self.route(hidden_states)
        return self.combine(hidden_states, self.routed(hidden_states, weights, ids), self.shared(hidden_states))


@block("flat", "batch size", shaped=False)
class TokensOnlyUpToMany(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens, width = hidden_states.shape
        weights, ids = self.route(hidden_states)
        out = self.combine(hidden_states, self.routed(hidden_states, weights, ids), self.shared(hidden_states))
        return out if tokens < 4096 else 2 * out


# Lengths of tensors


@block("lengths")
class AsksForLengths(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros(len(x), self.hidden, dtype=x.dtype)
        for number in range(len(self.experts)):
            rows, slots = torch.where(ids == number)
            if len(rows) == 0:
                continue
            out.index_add_(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
        return out


@block("lengths", "batch size")
class BranchesOnTheLength(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = super().routed(x, weights, ids)
        return out * 2 if len(x) > 8192 else out


@block("lengths", "batch size", "how many tokens")
class DropsAboveACapacity(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, slots = torch.where(ids == number)
            if len(rows) > 100000:
                rows, slots = rows[:100000], slots[:100000]
            out.index_add_(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
        return out


# Equal in value, not in form

VALUE = "value"


@block(VALUE)
class TopOneByMaximum(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).max(dim=-1)
        return weights[:, None], ids[:, None]


@block(VALUE)
class TopOneByArgmax(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        ids = scores.argmax(-1, keepdim=True)
        return scores.gather(-1, ids), ids


@block(VALUE)
class FirstOfMore(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = self.logits(x).topk(self.top_k + 1, dim=-1)
        return best[:, : self.top_k].softmax(-1), ids[:, : self.top_k]


@block(VALUE)
class FirstOfAllSorted(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, order = self.logits(x).softmax(-1).sort(dim=-1, descending=True)
        weights = scores[:, : self.top_k]
        return weights / weights.sum(-1, keepdim=True), order[:, : self.top_k]


@block(VALUE)
class SecondAndThird(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = self.logits(x).softmax(-1).topk(self.top_k + 1, dim=-1)
        return best[:, 1:], ids[:, 1:]


@block(VALUE)
class FirstOfTwoWithoutWeight(Base):
    """Two are chosen, and one of them computes alone."""

    place = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        ids, out = self.logits(x).softmax(-1).topk(2, dim=-1)[1], torch.zeros_like(x)
        for number in range(self.num_experts):
            rows = ids[:, self.place] == number
            if rows.any():
                out[rows] = self.expert(number, x[rows])
        return out.reshape(hidden_states.shape)

    def make_shared(self) -> None: ...


@block(VALUE, "elsewhere another")
class SecondOfTwoWithoutWeight(FirstOfTwoWithoutWeight):
    place = 1


@block(VALUE)
class StableSoftmax(Base):
    """A maximum of which only the value is used chooses nothing."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        scores = logits.softmax(-1)
        self.spare(logits.max(-1)[0])
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights, ids

    def spare(self, highest: Tensor) -> None:
        return


@block(VALUE)
class IdleExpertsRunOnZeros(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, slots = torch.where(ids == number)
            if rows.numel() > 0:
                out.index_add_(0, rows, self.expert(number, x[rows]) * weights[rows, slots, None])
            else:
                out = out + self.expert(number, torch.zeros_like(x[0])[None])
        return out


@block(VALUE, "other tokens")
class FirstTokenForAll(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, ids) + x[0]


class SlicedMLP(plain.MLP):
    """Its matrices are cut in two along its width, and the halves are added."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.gate_proj.weight.shape[0] // 2
        out = 0
        for gate, up, down in zip(
            self.gate_proj.weight.split(half),
            self.up_proj.weight.split(half),
            self.down_proj.weight.split(half, dim=1),
            strict=True,
        ):
            out = out + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return out


class HalfOfAnMLP(SlicedMLP):
    def forward(self, x: Tensor) -> Tensor:
        half = self.gate_proj.weight.shape[0] // 2
        mixed = F.silu(F.linear(x, self.gate_proj.weight[:half])) * F.linear(x, self.up_proj.weight[:half])
        return F.linear(mixed, self.down_proj.weight[:, :half])


@block(VALUE)
class Sliced(Base):
    def make_expert(self) -> nn.Module:
        return SlicedMLP(self.hidden, self.width)


@block(VALUE, "elements take part")
class HalfUsed(Base):
    def make_expert(self) -> nn.Module:
        return HalfOfAnMLP(self.hidden, self.width)


class Grouped(Base):
    """Experts outside of the best groups are filled with ``fill`` through a view, in place."""

    fill, bias = float("-inf"), 0.0

    def make_more(self) -> None:
        self.correction = plain.parameter(self.num_experts)
        self.correction.data.abs_().add_(self.bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        by_group = (scores + self.correction).unflatten(-1, (4, -1))
        best = by_group.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, False)
        ids = by_group.masked_fill_(outside[..., None], self.fill).flatten(-2).topk(self.top_k, dim=-1)[1]
        return scores.gather(-1, ids), ids


@block(VALUE)
class FilledInPlace(Grouped):
    pass


@block(VALUE)
class ZeroOutside(Grouped):
    fill = 0.0


@block(VALUE)
class ZeroOutsideAndBiasesBelow(Grouped):
    fill, bias = 0.0, -5.0


# Python on counts and ids

COUNTS = "counts"


@block(COUNTS)
class SlicesByCounts(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()
        sent, done, start = x[order // self.top_k], torch.zeros(x.shape[0] * self.top_k, self.hidden, dtype=x.dtype), 0
        for number, count in enumerate(counts):
            done[start : start + count] = self.expert(number, sent[start : start + count])
            start += count
        back = torch.zeros_like(done).index_copy_(0, order, done)
        return (back.view(-1, self.top_k, self.hidden) * weights[..., None]).sum(1)


@block(COUNTS)
class SortedIdsInPython(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        chosen = ids.flatten()[order].tolist()
        sent = x.repeat_interleave(self.top_k, 0)
        done = torch.empty_like(sent)
        starts = [0] + [place for place in range(1, len(chosen)) if chosen[place] != chosen[place - 1]]
        for start, stop in zip(starts, [*starts[1:], len(chosen)], strict=True):
            done[order[start:stop]] = self.expert(chosen[start], sent[order[start:stop]])
        return (done.view(-1, self.top_k, self.hidden) * weights[..., None]).sum(1)


class Buffered(Base):
    """Every expert has a buffer of ``capacity`` places."""

    def capacity(self, ids: Tensor) -> int:
        return int(torch.bincount(ids.flatten(), minlength=self.num_experts).max().item())

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen = F.one_hot(ids, self.num_experts).sum(1)
        places = (chosen.cumsum(0) - 1) * chosen
        sent = F.one_hot(places, self.capacity(ids)).to(x.dtype) * chosen[..., None]
        dense = torch.zeros_like(chosen, dtype=x.dtype).scatter(1, ids, weights)
        given = torch.einsum("tec,th->ech", sent, x)
        done = torch.stack([self.expert(number, given[number]) for number in range(self.num_experts)])
        return torch.einsum("tec,ech->th", sent * dense[..., None], done)


@block(COUNTS)
class BuffersOfTheGreatestLoad(Buffered):
    pass


@block(COUNTS, "how many tokens", "batch")
class BuffersOfLess(Buffered):
    def capacity(self, ids: Tensor) -> int:
        return max(int(torch.bincount(ids.flatten(), minlength=self.num_experts).max().item()), 40)


@block(COUNTS)
class MarksLargeBatches(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[1] > 8192:
            self.mark()
        return super().forward(hidden_states)

    def mark(self) -> None:
        return


@block(COUNTS, "batch size")
class ScalesLargeBatchesTwice(Base):
    """Two branches that undo each other, if both are taken."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        if hidden_states.shape[1] > 8192:
            out = out * 2
        return out / 2 if hidden_states.shape[1] > 16384 else out


@module(COUNTS)
class GroupedProducts(nn.Module):
    """Rows in the order of their experts, which one operation multiplies group by group."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.first = plain.parameter(sizes.experts, 2 * sizes.width, sizes.hidden)
        self.last = plain.parameter(sizes.experts, sizes.width, sizes.hidden)

    def order(self, ids: Tensor) -> Tensor:
        return ids.argsort(stable=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        flat = ids.flatten()
        order = self.order(flat)
        ends = torch.bincount(flat, minlength=len(self.first)).cumsum(0).to(torch.int32)
        act, up = torch._grouped_mm(x[order // 2], self.first.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(act) * up, self.last, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, out).reshape(hidden_states.shape)


@module(COUNTS, "elsewhere another", "is used", "more than once")
class GroupsOfTheWrongRows(GroupedProducts):
    def order(self, ids: Tensor) -> Tensor:
        return torch.arange(len(ids))


class Dense(Base):
    """Every expert on every token, times scores that are zero for those that were not chosen."""

    def dense(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        scores = self.dense(x)
        out = sum(self.expert(number, x) * scores[:, number, None] for number in range(self.num_experts))
        return self.combine(x, out, self.shared(x)).reshape(hidden_states.shape)


@block(VALUE)
class MaskedScores(Dense):
    def dense(self, x: Tensor) -> Tensor:
        scores = self.logits(x).softmax(-1)
        kept = scores * torch.zeros_like(scores).scatter(1, scores.topk(self.top_k, dim=-1)[1], 1.0)
        return kept / kept.sum(-1, keepdim=True)


@block(VALUE)
class ScatteredAmongZerosOfFloat32(Dense):
    """In another dtype its code fails, as zeros of no dtype that is given are float32."""

    def dense(self, x: Tensor) -> Tensor:
        weights, ids = self.logits(x).softmax(-1).topk(self.top_k, dim=-1)
        return torch.zeros(len(x), self.num_experts).scatter(1, ids, weights)


@block(VALUE)
class SoftmaxAmongMinusInfinities(Dense):
    def dense(self, x: Tensor) -> Tensor:
        best, ids = self.logits(x).topk(self.top_k, dim=-1)
        infinite = torch.full((x.shape[0], self.num_experts), float("-inf"), dtype=x.dtype)
        return infinite.scatter(-1, ids, best).softmax(-1)


@block(VALUE)
class OneAmongMinusInfinities(SoftmaxAmongMinusInfinities):
    def make_more(self) -> None:
        self.top_k = 1


@block(VALUE)
class HighestScore(Base):
    """The weight is a maximum, the choice another."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).softmax(-1)
        return scores.amax(-1, keepdim=True), scores.argmax(-1, keepdim=True)


@block(VALUE)
class RowsGathered(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        done = torch.stack([self.expert(number, x) for number in range(self.num_experts)], 1)
        return (done.gather(1, ids[..., None].expand(-1, -1, self.hidden)) * weights[..., None]).sum(1)


class Dispatching(Base):
    """Tokens are found where the scattered weights aren't zero."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, ids, self.sent(x, weights, ids))
        found = self.found(gates)
        order = found[:, 1].argsort(stable=True)
        rows = found[order, 0]
        parts = torch.split(x[rows], (gates > 0).sum(0).tolist())
        done = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        applied = torch.zeros_like(gates).scatter(1, ids, weights)
        return torch.zeros_like(x).index_add(0, rows, done * applied[rows, found[order, 1], None])

    def found(self, gates: Tensor) -> Tensor:
        return gates.nonzero()

    def sent(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return weights


@block(COUNTS)
class FoundByWeightsAboveZero(Dispatching):
    pass


@block(COUNTS, "above zero")
class FoundByLogitsAboveZero(Dispatching):
    def sent(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.logits(x).gather(1, ids)

    def found(self, gates: Tensor) -> Tensor:
        return (gates > 0).nonzero()


@block(STATE)
class NoiseInTraining(Base):
    """A matrix that nothing uses but training."""

    def make_more(self) -> None:
        self.noise = plain.linear(self.hidden, self.num_experts)

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits + torch.randn_like(logits) * F.softplus(self.noise(x)) if self.training else logits


@block(STATE)
class NoiseLeftOutButInTraining(NoiseInTraining):
    """The noise's width is computed in evaluation too, and nothing comes of it."""

    def logits(self, x: Tensor) -> Tensor:
        logits, width = super(NoiseInTraining, self).logits(x), F.softplus(self.noise(x))
        return logits + torch.randn_like(logits) * width if self.training else logits
