"""Blocks of the forms that published code and training repositories have beside those in :mod:`zoo.others`.

Near misses have ``words``, as there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import around, plain
from .around import AROUND, Alone
from .others import COUNTS, PLACES, RESULTS, STATE, _Kept, block, module

__all__ = ["ALL"]


@block(STATE, "nor one of its own weights")
class ConvertsItsRouter(Alone):
    """Its router's matrix becomes another parameter when it is called first (nllb-moe)."""

    def logits(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(torch.bfloat16)
        return self.gate(x.bfloat16()).float()


@block(RESULTS)
class CountsRowsInPython(Alone):
    """How many rows each expert gets, by len() of its list of them, in the input's dtype (labml's Switch)."""

    def forward(self, hidden_states: Tensor) -> Any:
        _, ids = self.route(hidden_states.view(-1, self.hidden))
        rows = [(ids == e).nonzero()[:, 0] for e in range(self.num_experts)]
        return super().forward(hidden_states), hidden_states.new_tensor([self.counted(chosen) for chosen in rows])

    def counted(self, rows: Tensor) -> int:
        return len(rows)


@block(RESULTS)
class CountsRowsBySize(CountsRowsInPython):
    def counted(self, rows: Tensor) -> int:
        return rows.size(0)


@block(RESULTS, "(1) comes of a tensor that it makes of numbers of tokens in Python")
class CountsRowsTwice(CountsRowsInPython):
    def counted(self, rows: Tensor) -> int:
        return 2 * len(rows)


@block(STATE, "keeps state")
class MakesABufferOnTheWay(Alone):
    def logits(self, x: Tensor) -> Tensor:
        if "shift" not in self._buffers:
            self.register_buffer("shift", torch.zeros(plain.SIZES.experts))
        return super().logits(x) + self.shift


class Dispatched(Alone):
    """Tokens in the order of their experts, found by a mask, in a shape that is kept for the way back (Megatron)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.hidden_shape = self.kept_shape(hidden_states)
        x = hidden_states.view(-1, self.hidden)
        weights, ids = self.route(x)
        dense = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, ids, weights).t()
        sent = torch.zeros(len(x), self.num_experts, dtype=torch.bool).scatter(1, ids, True).t().contiguous()
        rows = torch.arange(len(x)).expand(self.num_experts, -1).masked_select(sent)
        parts = x.index_select(0, rows).split(sent.sum(1).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        done = done * dense.contiguous().masked_select(sent)[:, None]
        out = torch.zeros_like(x).index_add_(0, rows, done)
        return out.view(self.hidden_shape)

    def kept_shape(self, hidden_states: Tensor) -> Any:
        return hidden_states.shape


@block(STATE)
class KeepsItsInputsShape(Dispatched):
    pass


@block(STATE)
class KeepsItsInputsShapeAsATuple(Dispatched):
    def kept_shape(self, hidden_states: Tensor) -> Any:
        return tuple(hidden_states.shape)


@block(STATE)
class KeepsItsInputsShapePutTogether(Dispatched):
    def kept_shape(self, hidden_states: Tensor) -> Any:
        return hidden_states.shape[:1] + hidden_states.shape[1:-1] + (self.hidden,)


@block(STATE, "keeps state")
class KeepsTheFirstInputsShape(Dispatched):
    hidden_shape = None

    def kept_shape(self, hidden_states: Tensor) -> Any:
        known = self.hidden_shape
        return hidden_states.shape if known is None or known.numel() != hidden_states.numel() else known


@block(STATE, "keeps state")
class DoublesAfterTheFirst(Dispatched):
    """It asks whether it was called before, and looks at nothing."""

    hidden_shape = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = 1.0 if self.hidden_shape is None else 2.0
        return super().forward(hidden_states) * factor


# Python on counts and ids


class InSlots(Alone):
    """A mask of tokens, experts and ``capacity`` slots, which no token may be beyond (Hunyuan, DeepSpeed)."""

    first = 0

    def capacity(self, counts: Tensor) -> Any:
        return int(counts.max())

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        scores = self.logits(x).softmax(-1)
        ids = scores.topk(self.top_k, dim=-1)[1]
        capacity = self.capacity(torch.bincount(ids.flatten(), minlength=self.num_experts))
        sum_ = (F.one_hot(ids, self.num_experts).to(x.dtype) @ scores[..., None]).sum(1)
        chosen = F.one_hot(ids.t().reshape(-1), self.num_experts)
        places = (chosen.cumsum(0) * chosen - 1).view(self.top_k, -1, self.num_experts).amax(0)
        valid = (places >= self.first) & (places < capacity)
        slots = F.one_hot(places.masked_fill(~valid, 0), capacity).bool().masked_fill(~valid[..., None], False)
        combined = torch.einsum("te,tec->tec", scores / sum_.clamp(min=1e-9), slots)
        given = torch.einsum("tec,th->ech", slots.to(x.dtype), x)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given, strict=True)])
        return torch.einsum("tec,ech->th", combined, done).reshape(hidden_states.shape)


@block(COUNTS)
class SlotsForTheGreatestLoad(InSlots):
    pass


@block(COUNTS)
class SlotsOfNoUse(SlotsForTheGreatestLoad):
    """A capacity is calculated of the batch first, and nothing comes of it (DeepSpeed, where no token is dropped)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.shape[:-1].numel()
        capacity = torch.ceil((tokens / self.num_experts) * torch.tensor(1.25)).to(torch.int64)
        torch.maximum(capacity, torch.tensor(4))
        return super().forward(hidden_states)


@block(COUNTS, "how many tokens")
class SlotsForTwoLoads(InSlots):
    """Not the greatest load, but at least that wherever it is one of these two."""

    def capacity(self, counts: Tensor) -> Any:
        return int(counts[-1] + counts[-2]) or int(counts.max())


@block(COUNTS, "how many tokens")
class SlotsForTheMeanLoad(InSlots):
    def capacity(self, counts: Tensor) -> Any:
        return int(counts.sum()) // self.num_experts or int(counts.max())


@block(COUNTS, "how many tokens")
class NoSlotForTheFirst(InSlots):
    first = 1


class MaskedByScores(Alone):
    """Tokens are sent where the mask of their weights isn't zero (DeepSpeed)."""

    def weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        kept = scores.softmax(-1) * chosen
        return kept / kept.sum(-1, keepdim=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(self.top_k, dim=-1)[1], True)
        weights = self.weights(logits, chosen)
        sent = weights.bool()
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(sent[:, number])[0]
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, number, None])
        return out.reshape(hidden_states.shape)


@block(COUNTS)
class FoundByWeightsThatArentZero(MaskedByScores):
    pass


@block(COUNTS, "above zero")
class FoundByLogitsThatArentZero(MaskedByScores):
    def weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        return F.relu(scores) * chosen


@block(RESULTS)
class WithLoadsOfItsWeights(Alone):
    """It returns how many weights are above zero, and its router is none that a spec says (LLaMA-MoE)."""

    def make_more(self) -> None:
        self.second = plain.linear(self.num_experts, self.num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return self.second(self.gate(x).tanh())

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        dense = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, ids, weights)
        out = self.routed(x, weights, ids).reshape(hidden_states.shape)
        load = (dense > 0).sum(0)
        return out, load, load.float().var() / (load.float().mean() ** 2 + 1e-10) + dense.sum(0).var()


@block(AROUND, "weight their inputs")
class OwnRouterWeightsInputs(Alone):
    """Its router is none that a spec says, and weights stand before its experts."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).tanh()

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            out.index_add_(0, rows, expert(x[rows] * weights[rows, slots, None]))
        return out


# Shapes


@block(RESULTS)
class TokensInOneDimension(Alone):
    """Its output is [T, H] whatever its input (gpt-fast)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).view(-1, self.hidden)


@block(RESULTS)
class ThreeDimensionsOfTokens(Alone):
    """Of tokens it makes [T, 1, H], which is another block (DBRX); it is replaced for batches."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).view(hidden_states.shape[0], -1, self.hidden)


@block(RESULTS, "another token's input", "batch size")
class TokensInAnotherOrder(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out.transpose(0, 1).reshape(-1, self.hidden) if out.ndim == 3 else out


class FourDimensions(_Kept):
    """Gate and up projections of all experts in one tensor."""

    def store(self, experts: int, hidden: int, width: int) -> None:
        self.first, self.last = plain.parameter(experts, 2, width, hidden), plain.parameter(experts, 1, hidden, width)

    def expert(self, number: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.first[number, 0])) * self.up(number, x), self.last[number, 0])

    def up(self, number: int, x: Tensor) -> Tensor:
        return F.linear(x, self.first[number, 1])


@module(PLACES)
class StackedInFourDimensions(FourDimensions):
    pass


@module(PLACES, "elements take part")
class HalfOfFourDimensions(FourDimensions):
    def up(self, number: int, x: Tensor) -> Tensor:
        return F.linear(x, self.first[number, 0])


@module(PLACES)
class ListsOfLayersBehindAnyRouter(nn.Module):
    """No matrix has a row for each expert, and a module of its own holds the experts' layers (Yuan)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.router, self.count = plain.linear(sizes.hidden, 3 * sizes.experts), sizes.experts
        self.experts = nn.Module()
        self.experts.first = nn.ModuleList(plain.linear(sizes.hidden, 2 * sizes.width) for _ in range(sizes.experts))
        self.experts.last = nn.ModuleList(plain.linear(sizes.width, sizes.hidden) for _ in range(sizes.experts))

    def logits(self, x: Tensor) -> Tensor:
        query, key, value = self.router(x).view(-1, self.count, 3).unbind(-1)
        attention = (query[:, :, None] * key[:, None]).softmax(-1)
        return (attention @ value[..., None]).squeeze(-1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.logits(x).topk(2, dim=-1)
        weights, out = weights.softmax(-1), torch.zeros_like(x)
        for number in range(self.count):
            rows, slots = torch.where(ids == number)
            gate, up = self.experts.first[number](x[rows]).chunk(2, -1)
            out.index_add_(0, rows, self.experts.last[number](F.silu(gate) * up) * weights[rows, slots, None])
        return out.reshape(hidden_states.shape)


@block(AROUND, "another token", "other tokens")
class EveryThirdTokensLogits(Alone):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).repeat(3, 1).view(-1, 3, self.num_experts).unbind(1)[0]


# Ids that are calculated from what was chosen


class BestOfEveryGroup(Alone):
    """Each group of experts gives one, times a factor of its own (Pangu)."""

    def make_more(self) -> None:
        self.factors = plain.parameter(1, self.num_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.logits(x).softmax(-1).view(len(x), 4, -1)
        weights, places = groups.max(-1)
        ids = self.numbered(places)
        return weights * self.factors.expand(len(x), -1).gather(1, ids), ids

    def numbered(self, places: Tensor) -> Tensor:
        return places + torch.arange(4) * (self.num_experts // 4)


@block(AROUND)
class OneOfEveryGroup(BestOfEveryGroup):
    pass


@block(AROUND)
class OneOfEveryGroupInAnotherOrder(BestOfEveryGroup):
    """Its experts have other numbers than its router's columns."""

    def numbered(self, places: Tensor) -> Tensor:
        return (3 - torch.arange(4)) * 2 + 1 - places


@block(AROUND, "experts", "scored by")
class OneOfHalfOfTheGroups(BestOfEveryGroup):
    """Two groups send their tokens to the same experts."""

    def numbered(self, places: Tensor) -> Tensor:
        return places + torch.arange(4) // 2 * 2


class SomeReturnTheirInput(Alone):
    """Two of eight experts have no weights (LongCat)."""

    free = (6, 7)

    def make_experts(self) -> None:
        super().make_experts()
        for number in self.free:
            self.experts[number] = nn.Identity()

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, slots = torch.where(ids == number)
            done = self.freely(x[rows]) if number in self.free else self.experts[number](x[rows])
            out.index_add_(0, rows, done * weights[rows, slots, None])
        return out

    def freely(self, x: Tensor) -> Tensor:
        return x


@block(AROUND)
class TheLastReturnTheirInput(SomeReturnTheirInput):
    pass


@block(AROUND)
class TheFirstReturnTheirInput(SomeReturnTheirInput):
    free = (0, 1)


@block(AROUND)
class TheLastReturnTheirInputsSquare(SomeReturnTheirInput):
    """What the experts without weights return, the block's own operations go on computing."""

    def freely(self, x: Tensor) -> Tensor:
        return x * x


@block(AROUND, "can't be told from", "times a routing weight")
class TheFirstReturnTheirInputsSquare(TheLastReturnTheirInputsSquare):
    free = (0, 1)


@block(AROUND)
class TheLastReturnNothing(SomeReturnTheirInput):
    def freely(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@block(AROUND)
class SomeInTheMiddleReturnNothing(TheLastReturnNothing):
    free = (2, 5)


@block(AROUND)
class OfThreeKindsWithoutWeights(SomeReturnTheirInput):
    """Zeros, copies, and mixes of the input with a constant (MoE++)."""

    free = (4, 5, 6, 7)

    def make_more(self) -> None:
        self.mix, self.constant = plain.linear(self.hidden, 2), plain.parameter(self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            rows, slots = torch.where(ids == number)
            done = self.kinds(number, x[rows]) if number in self.free else self.experts[number](x[rows])
            out.index_add_(0, rows, done * weights[rows, slots, None])
        return out

    def kinds(self, number: int, x: Tensor) -> Tensor:
        if number < 6:
            return torch.zeros_like(x) if number == 4 else x
        shares = self.mix(x).softmax(-1)
        return torch.einsum("t,th->th", shares[:, 0], x) + torch.einsum("t,h->th", shares[:, 1], self.constant)


@block(AROUND, "comes to nothing", "elsewhere another", "stands in the batch")
class TheLastDropTheirOddTokens(SomeReturnTheirInput):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        odd = torch.arange(len(x)) % 2 == 1
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sent = ids == number
            rows, slots = torch.where(sent & odd[:, None] if number in self.free else sent)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


@block(AROUND, "comes to nothing", "cuts the batch")
class TheLastServeTheirFirstTwo(SomeReturnTheirInput):
    """Their others come to nothing."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            if number in self.free:
                rows, slots = rows[:2], slots[:2]
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


@block(AROUND)
class InTwoStages(Alone):
    """One router chooses a pair of experts, and another that pair's expert: 0 or 1 whichever pair it is."""

    def make_router(self) -> None:
        self.outer = plain.linear(self.hidden, self.num_experts // 2)
        self.inner = plain.parameter(self.num_experts // 2, 2, self.hidden)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outer, pair = self.outer(x).softmax(-1).topk(1, dim=-1)
        logits = torch.einsum("th,tnh->tn", x, self.inner[pair[:, 0]])
        weights, ids = logits.softmax(-1).topk(1, dim=-1)
        return outer * weights, self.numbered(pair, ids)

    def numbered(self, pair: Tensor, ids: Tensor) -> Tensor:
        return pair * 2 + ids


@block(AROUND, "multiplied by chosen")
class InTwoStagesThatOverlap(InTwoStages):
    """The second of one pair is the first of the next; some experts are never chosen."""

    def numbered(self, pair: Tensor, ids: Tensor) -> Tensor:
        return pair + ids


@block(AROUND)
class TwiceAsWideInside(Alone):
    """Its experts are given twice the input's size, which its code gives as a number."""

    def make_experts(self) -> None:
        self.enter, self.leave = plain.linear(32, 64), plain.linear(64, 32)
        self.experts = nn.ModuleList(plain.MLP(64, self.width) for _ in range(self.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, 32)
        return self.leave(self.routed(self.enter(x), *self.route(x))).view(hidden_states.shape)


@block(AROUND)
class MostWeightsAreOne(Alone):
    """A softmax over those logits alone that come within two percent of the largest (Phi-3.5-MoE)."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        first, best = self.within(logits)
        second, other = self.within(logits.scatter(-1, best, float("-inf")))
        return torch.cat([first, second], -1), torch.cat([best, other], -1)

    def within(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        largest, best = logits.max(dim=-1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 0.02
        return logits.masked_fill(far, float("-inf")).softmax(-1).gather(-1, best), best


@block(AROUND)
class WeighsByMaskedScores(Alone):
    """Weights are found by a mask of the experts in scores that are zero outside of groups (Hunyuan)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        scores = self.logits(x).softmax(-1)
        best = scores.view(len(x), 4, -1).amax(-1).topk(2, dim=-1, sorted=False).indices
        kept = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, best, 1).bool().unsqueeze(-1)
        kept = kept.expand(-1, -1, self.num_experts // 4).reshape(scores.shape)
        scores = scores.masked_fill(~kept, 0.0)
        sent = F.one_hot(scores.topk(self.top_k, dim=-1).indices, self.num_experts).sum(1).to(x.dtype)
        scores = scores * sent
        scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * scores[:, number, None]
        return out.reshape(hidden_states.shape)


ALL = around.ALL  # those above among them
