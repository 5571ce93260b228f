"""More blocks of the forms that published code has, beside those in :mod:`zoo.forms`. Near misses have ``words``."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import forms, plain
from .around import Alone
from .others import COUNTS, PLACES, RESULTS, block, module

__all__ = ["ALL"]


@block(RESULTS)
class ThreeDimensionsAndLogits(Alone):
    """Of tokens it makes [T, 1, H], beside logits (gpt-oss in transformers 4.57); it is replaced for batches."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        return self.routed(x, weights, ids).view(hidden_states.shape[0], -1, self.hidden), self.logits(x)


@block(COUNTS)
class RowAfterRow(Alone):
    """A loop over the rows of the batch (CuMo)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, ids = self.route(hidden_states)
        out = torch.zeros(hidden_states.shape[0], hidden_states.shape[1], self.hidden).to(hidden_states.dtype)
        for row in range(hidden_states.shape[0]):
            for number in range(self.num_experts):
                place, slot = torch.where(ids[row] == number)
                done = self.expert(number, hidden_states[row][place])
                out[row][place] += weights[row][place, slot, None] * done * self.factor(row)
        return out

    def factor(self, row: int) -> float:
        return 1.0


@block(COUNTS, "differently")
class RowsBeyond64Twice(RowAfterRow):
    def factor(self, row: int) -> float:
        return 2.0 if row > 64 else 1.0


@block(COUNTS, "elsewhere", "another token", "batch")
class FirstRowForAll(RowAfterRow):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states[0]


@block(PLACES)
class StackedOnTheWay(Alone):
    """Layers of a list are stacked in every call, and groups of rows multiplied by them (OLMo 3 MoE)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=self.num_experts).cumsum(0).to(torch.int32)
        experts = [getattr(expert, "mlp", expert) for expert in self.in_order()]
        first = torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)).t() for e in experts])
        last = torch.stack([e.down_proj.weight.t() for e in experts])
        gate, up = torch._grouped_mm(x[order // self.top_k], first, offs=ends).chunk(2, dim=-1)
        done = torch._grouped_mm(F.silu(gate) * up, last, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // self.top_k, done)

    def in_order(self) -> list[nn.Module]:
        return list(self.experts)


@block(PLACES)
class StackedFromTheLast(StackedOnTheWay):
    """The same experts under other numbers."""

    def in_order(self) -> list[nn.Module]:
        return list(reversed(self.experts))


@block(COUNTS)
class SlotsOfAllTokens(Alone):
    """First choices of all tokens, then second ones; a slot's token is what is left when it is divided (Arctic)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen = F.one_hot(ids.t().reshape(-1), self.num_experts).t()
        slots = torch.cat([torch.where(row)[0] for row in chosen])
        ends = chosen.sum(1).cumsum(0).tolist()
        tokens = self.tokens_of(slots, x)
        parts = [x[tokens[start:end]] for start, end in zip([0, *ends], ends, strict=False)]
        done = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add_(0, tokens, done * weights.t().reshape(-1)[slots, None])

    def tokens_of(self, slots: Tensor, x: Tensor) -> Tensor:
        return slots % x.shape[0]


@block(COUNTS)
class PlacesByTrueDivision(Alone):
    """A place is divided by k, and rounded down afterwards (gpt-fast)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        tokens = (order / self.top_k).floor().to(torch.int64)
        ends = torch.bincount(ids.flatten(), minlength=self.num_experts).cumsum(0).tolist()
        parts = [x[tokens[start:end]] for start, end in zip([0, *ends], ends, strict=False)]
        done = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add_(0, tokens, done * weights.flatten()[order, None])


@block(COUNTS, "divides it by 1024")
class SlotsOfABlockOfTokens(SlotsOfAllTokens):
    def tokens_of(self, slots: Tensor, x: Tensor) -> Tensor:
        return slots % 1024 % x.shape[0]


class LossBesideABranch(Alone):
    """It returns a loss, and asks for the length of the sequence on the way."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden)
        loss = self.logits(x).softmax(-1).mean(0).square().sum()
        if hidden_states.shape[-2] > 8192:
            loss = self.of_long(loss)
        return super().forward(hidden_states), loss

    def of_long(self, loss: Tensor) -> Tensor:
        return loss


@block(COUNTS)
class SaysSoOfLongOnes(LossBesideABranch):
    """That it is long is of use for something else than what comes of it (Arctic on HPUs)."""


@block(COUNTS, "compares it")
class TwiceForLongOnes(LossBesideABranch):
    def of_long(self, loss: Tensor) -> Tensor:
        return loss * 2


class _Shard(nn.Module):
    def __init__(self, sizes: plain.Sizes, count: int) -> None:
        super().__init__()
        self.first = plain.parameter(count, 2 * sizes.width, sizes.hidden)
        self.last = plain.parameter(count, sizes.hidden, sizes.width)

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        for number in range(len(self.first)):
            slot, token = torch.where(mask[number])
            gate, up = F.linear(x[token], self.first[number]).chunk(2, dim=-1)
            done = F.linear(F.silu(gate) * up, self.last[number]) * weights[token, slot, None]
            out.index_add_(0, token, done.to(out.dtype))
        return out


@module(PLACES)
class InShards(nn.Module):
    """A list of modules, each with some of the experts stacked (XTuner)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES, shards: int = 2) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.per_shard = sizes.experts // shards
        self.experts = nn.ModuleList(_Shard(sizes, self.per_shard) for _ in range(shards))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, ids = logits.softmax(-1).topk(2, dim=-1)
        mask = F.one_hot(ids, num_classes=logits.shape[-1]).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number, shard in enumerate(self.experts):
            out = shard(x, mask[number * self.per_shard : (number + 1) * self.per_shard], weights, out)
        return out.reshape(hidden_states.shape), logits


@module(PLACES)
class InOneShard(InShards):
    def __init__(self) -> None:
        super().__init__(shards=1)


@lru_cache
def _flattened(shape: tuple[int, ...]) -> tuple[int, int]:
    return _flat(shape)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0] * shape[1], shape[2]


@block(COUNTS)
class RemembersShapes(Alone):
    """What it did for a shape is kept, where a shape can be a key (einops)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.ndim == 2:
            return super().forward(hidden_states)
        try:
            shape = _flattened(hidden_states.shape)
        except TypeError:
            shape = _flat(hidden_states.shape)
        return super().forward(hidden_states.reshape(shape)).reshape(hidden_states.shape)


ALL = forms.ALL  # those above among them
