"""Blocks that keep numbers of tokens in Python, and do one token by itself (JetMoE, ModuleFormer)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import over_places
from .around import Alone
from .others import COUNTS, RESULTS, STATE, block

__all__ = ["ALL"]


class _Loads(Alone):
    """It keeps how its tokens are sorted, with a list of loads, and reads that in the same call."""

    def sort(self, weights: Tensor, ids: Tensor) -> None:
        self.order = ids.flatten().sort(stable=True).indices
        self.sorted_weights = weights.flatten()[self.order]
        self.loads = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        self.sort(weights, ids)
        tokens = self.order.div(self.top_k, rounding_mode="trunc")
        parts = zip(self.experts, x[tokens].split(self.loads), strict=True)
        out = torch.cat([expert(part) for expert, part in parts]) * self.sorted_weights[:, None]
        return torch.zeros_like(x).index_add(0, tokens, out)

    def alone(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The output of one token."""
        return sum(weights[:, n : n + 1] * self.one(x, ids[0, n]) for n in range(self.top_k))  # type: ignore[return-value]

    def one(self, x: Tensor, expert: Tensor) -> Tensor:
        out: Tensor = self.experts[int(expert)](x)
        return out


@block(STATE)
class KeepsItsLoads(_Loads):
    pass


@block(STATE)
class KeepsItsLoadsOfSeveral(_Loads):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.alone(x, weights, ids) if len(x) == 1 else super().routed(x, weights, ids)


@block(STATE, "depends on the batch size")
class KeepsOtherLoadsOfOne(_Loads):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        self.sort(weights * 2 if len(x) == 1 else weights, ids)
        return super(_Loads, self).routed(x, weights, ids)


@block(STATE, "a number of tokens in Python")
class AddsUpItsLoads(_Loads):
    def sort(self, weights: Tensor, ids: Tensor) -> None:
        before = getattr(self, "loads", [0] * self.num_experts)
        super().sort(weights, ids)
        self.total = [one + other for one, other in zip(before, self.loads, strict=True)]


@block(RESULTS)
class WithItsLoads(Alone):
    def forward(self, hidden_states: Tensor) -> Any:
        _, ids = self.route(hidden_states.reshape(-1, self.hidden))
        return super().forward(hidden_states), F.one_hot(ids, self.num_experts).sum((0, 1)).tolist()


class _WritesInto(Alone):
    """Its experts' outputs are written to parts of a buffer by products that are told where."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().sort(stable=True).indices
        loads = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()
        given = x[order // self.top_k].split(loads)
        done = torch.empty(len(order), x.shape[-1], dtype=x.dtype)
        into = self.parts(done, loads)
        for expert, part, place in zip(self.experts, given, into, strict=True):
            inner = expert.act_fn(expert.gate_proj(part)) * expert.up_proj(part)
            torch.mm(inner, expert.down_proj.weight.t(), out=place)
        out = self.whole(done, into) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // self.top_k, out)

    def parts(self, done: Tensor, loads: list[int]) -> tuple[Tensor, ...]:
        return done.split(loads)

    def whole(self, done: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        return done


@block(COUNTS)
class WritesInto(_WritesInto):
    pass


@block(COUNTS, "writes to a tensor of another form")
class WritesIntoNothing(_WritesInto):
    """Torch gives them their size, once."""

    def parts(self, done: Tensor, loads: list[int]) -> tuple[Tensor, ...]:
        return tuple(done.new_empty(0) for _ in loads)

    def whole(self, done: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(parts)


ALL = over_places.ALL  # those above among them
