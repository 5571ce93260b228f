"""Blocks as other people write them, by kind: what they return, take, keep, and how they spell the same computation.

Those with ``words`` are near misses of the same kind: they must be left alone, and the reason must name one of them.
"""

from __future__ import annotations

import dataclasses
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


@block(RESULTS, "loads")
class WithLoads(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        _, ids = self.route(hidden_states.reshape(-1, self.hidden))
        return super().forward(hidden_states), {"loads": torch.bincount(ids.flatten(), minlength=self.num_experts)}


@block(RESULTS, "(1)")
class WithMeanOfLogits(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states).mean()


@block(RESULTS, "(1)")
class WithTheHiddenStates(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), hidden_states


@block(RESULTS, "(1)")
class WithIdsMadeOfIds(Base):
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        out = self.combine(x, self.routed(x, weights, ids), self.shared(x)).reshape(hidden_states.shape)
        return out, ids + 1


@block(RESULTS, "(1)")
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


@block(ARGUMENTS, "batch size")
class Varied(Base):
    def forward(self, hidden_states: Tensor, *, batch_size: int | None = None) -> Any:
        return super().forward(hidden_states) * (batch_size or len(hidden_states))


class _Experts(nn.Module):
    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(plain.MLP(sizes.hidden, sizes.width) for _ in range(sizes.experts))

    def forward(self, x: Tensor, scores: Tensor, top_weights: Tensor, top_experts: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for number, mlp in enumerate(self.mlps):
            rows, slots = torch.where(top_experts == number)
            out.index_add_(0, rows, mlp(flat[rows]) * top_weights[rows, slots, None])
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


@module(PLACES, "input of a linear map")
class OneWideLayer(nn.Module):
    """Experts are slices of one MLP, and weights stand inside it: listed, though it can't be read."""

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


# State that is written and never read

STATE = "state"


@block(STATE)
class WritesZero(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.aux_loss = hidden_states.new_zeros(())
        self.calls_counted = False
        return super().forward(hidden_states)


@block(STATE, "last")
class RemembersItsChoice(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.last = self.route(hidden_states.reshape(-1, self.hidden))[1]
        return super().forward(hidden_states)


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
