"""More blocks of the forms that published code has, beside those in :mod:`zoo.forms`. Near misses have ``words``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import forms, plain
from .around import Alone
from .others import COUNTS, PLACES, RESULTS, STATE, block, module

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


class Sent:
    """Tokens sent to experts by what is left of a table of gates, and their answers brought back (D. Rau)."""

    def __init__(self, gates: Tensor) -> None:
        found = torch.nonzero(gates)
        in_order, places = found.sort(0)
        self.size = len(gates)
        _, experts = in_order.split(1, dim=1)
        self.tokens = found[places[:, 1], 0]
        self.loads = (gates > 0).sum(0).tolist()
        self.weights = gates[self.tokens].gather(1, experts)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[self.tokens].split(self.loads)

    def back(self, parts: list[Tensor]) -> Tensor:
        done = torch.cat(parts) * self.weights
        return torch.zeros(self.size, done.shape[1], dtype=done.dtype).index_add(0, self.tokens, done)


@block(COUNTS, shaped=False)
class TokensWithALoss(Alone):
    """It takes [T, H] alone, and returns a loss too."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden_states)
        top, ids = logits.topk(self.top_k + 1, dim=1)
        gates = torch.zeros_like(logits).scatter(1, ids[:, : self.top_k], top[:, : self.top_k].softmax(1))
        load = (gates > 0).sum(0).float()
        sent = Sent(gates)
        parts = [expert(part) for expert, part in zip(self.experts, sent.parts(hidden_states), strict=True)]
        return sent.back(parts), load.var() / load.mean() ** 2


@block(COUNTS, "another dimension")
class ExpertsChooseTokens(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        scores = self.logits(x).softmax(-1)
        weights, tokens = scores.topk(1, dim=0)
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            done = self.expert(number, x[tokens[:, number]])
            out.index_add_(0, tokens[:, number], done * weights[:, number, None])
        return out.reshape(hidden_states.shape)


@block(COUNTS)
class WeightsOfEverySlot(Alone):
    """Each slot's weights are added where its tokens are, of which there may be none."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            slots = ids == number
            tokens = slots.any(-1).nonzero(as_tuple=True)[0]
            if len(tokens) == 0:
                continue
            whole = torch.zeros(len(tokens), dtype=weights.dtype)
            for slot in range(ids.shape[1]):
                here = slots[tokens, slot]
                whole[here] += weights[tokens[here], slot]
            out[tokens] += whole[:, None] * self.expert(number, x[tokens])
        return out


class ScaledByTheNumberOfTokens(Alone):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        loads = F.one_hot(ids, self.num_experts).sum((0, 1)) / (len(x) * self.top_k)
        loss = (loads * self.logits(x).softmax(-1).sum(0) / len(x)).sum() * self.num_experts
        return self.scaled(self.routed(x, weights, ids), len(x)).reshape(hidden_states.shape), loss

    def scaled(self, out: Tensor, tokens: int) -> Tensor:
        return out


@block(COUNTS)
class LossByTheNumberOfTokens(ScaledByTheNumberOfTokens):
    """Means of a loss are sums divided by the number of tokens."""


@block(COUNTS, "calculates with the batch size")
class OutputByTheNumberOfTokens(ScaledByTheNumberOfTokens):
    def scaled(self, out: Tensor, tokens: int) -> Tensor:
        return out / tokens


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


class WeightsItsInputs(Alone):
    wide = torch.float32

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            given = x[token].to(self.wide) * weights[token, slot, None].to(self.wide)
            out.index_add_(0, token, self.expert(number, given.to(x.dtype)))
        return out


@block(PLACES)
class WeightsItsInputsInFloat32(WeightsItsInputs):
    """They are rounded afterwards (torchtitan)."""


@block(PLACES, "float16")
class WeightsItsInputsInFloat16(WeightsItsInputs):
    wide = torch.float16


PART = 80


class InParts(Alone):
    """So many tokens at a time, as they take memory on their way."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        parts = zip(x.split(PART), weights.split(PART), ids.split(PART), strict=True)
        return torch.cat([self.part(number, *part) for number, part in enumerate(parts)])

    def part(self, number: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, ids)


@block(COUNTS)
class PartsOfTokens(InParts):
    pass


@block(COUNTS, "differently", "different ways")
class ThirdPartTwice(InParts):
    def part(self, number: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().part(number, x, weights, ids) * (2 if number == 2 else 1)


@block(COUNTS, "another token", "adds x")
class PartsWithTheirFirstToken(InParts):
    def part(self, number: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().part(number, x, weights, ids) + x[:1]


@block(COUNTS, "its output is", "cuts the batch")
class OnlyTheFirstPart(InParts):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states[:, :PART])


@block(COUNTS)
class PartsByTheirPlaces(InParts):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for start in range(0, x.shape[0], PART):
            part = slice(start, min(start + PART, x.shape[0]))
            out[part] = self.part(start, x[part], weights[part], ids[part])
        return out


@block(COUNTS)
class PartsWithIdsInANewTensor(InParts):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        held = x.new_empty(ids.shape, dtype=ids.dtype)
        held[:] = ids
        return super().routed(x, weights, held)


@block(COUNTS, "differently", "different ways")
class PartsOfOtherWeights(PartsByTheirPlaces):
    def part(self, number: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().part(number, x, weights * (1 + number // PART), ids)


@block(COUNTS, "elsewhere another", "treats tokens")
class OtherExpertsForLaterParts(PartsByTheirPlaces):
    def part(self, number: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        others = torch.tensor([0, 1, 2, 7, 4, 5, 6, 3])
        return super().part(number, x, weights, others[ids] if number else ids)


@block(COUNTS, "ranks its tokens in parts")
class RoutedInParts(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        return torch.cat([self.routed(part, *self.route(part)) for part in x.split(PART)]).reshape(hidden_states.shape)


@block(COUNTS)
class PartsOfAnExpertsTokens(Alone):
    """Of a block with a router of its own (a port of MiniMax-M2)."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.logits(x).sigmoid() + 0.1 * self.logits(x).tanh()).topk(self.top_k, dim=-1)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            tokens, slots = torch.where(ids == number)
            for start in range(0, tokens.shape[0], PART):
                token, slot = tokens[start : start + PART], slots[start : start + PART]
                out.index_add_(
                    0, token, self.weighted(start, self.expert(number, x[token]), weights[token, slot, None])
                )
        return out

    def weighted(self, start: int, done: Tensor, weights: Tensor) -> Tensor:
        return done * weights


@block(COUNTS, "differently", "told from", "is used", "elsewhere", "uses")
class LaterTokensOfAnExpertTwice(PartsOfAnExpertsTokens):
    def weighted(self, start: int, done: Tensor, weights: Tensor) -> Tensor:
        return done * weights * (2 if start else 1)


@block(COUNTS, "takes no part", "comes to nothing", "uses")
class NoMoreThanAPartForAnExpert(Alone):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = (places[:PART] for places in torch.where(ids == number))
            out.index_add_(0, token, self.expert(number, x[token]) * weights[token, slot, None])
        return out


@block(COUNTS, "its own operations")
class ALossOfParts(InParts):
    def forward(self, hidden_states: Tensor) -> Any:
        logits = self.logits(hidden_states.reshape(-1, self.hidden))
        return super().forward(hidden_states), sum(part.softmax(-1).mean() for part in logits.split(PART))


@block(COUNTS, "cuts the batch", "ranks its tokens in parts")
class ARouterInParts(PartsOfAnExpertsTokens):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [super(ARouterInParts, self).route(part) for part in x.split(PART)]
        return torch.cat([weights for weights, _ in parts]), torch.cat([ids for _, ids in parts])


@block(COUNTS, "cuts the batch at 4096")
class LongerPartsThanAreAsked(Alone):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        parts = zip(x.split(4096), weights.split(4096), ids.split(4096), strict=True)
        return torch.cat([super(LongerPartsThanAreAsked, self).routed(*part) for part in parts])


class Counting(Alone):
    """Loads are counted in every call, for somebody who balances them (torchtitan)."""

    dtype = torch.float32

    def make_more(self) -> None:
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts, dtype=self.dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        with torch.no_grad():
            self.count(x, ids, torch.bincount(ids.flatten(), minlength=self.num_experts))
        return weights, ids

    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        raise NotImplementedError


@block(STATE)
class CountsByHistogram(Counting):
    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        size = self.num_experts
        self.tokens_per_expert.add_(torch.histc(ids.float().view(-1), bins=size, min=0, max=size))


@block(STATE)
class CountsAndForgets(Counting):
    """A running mean of loads, the calls, and a running mean of the tokens."""

    def make_more(self) -> None:
        super().make_more()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.zeros(self.hidden))

    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.calls += 1
        self.tokens_per_expert.mul_(0.9).add_(loads / loads.sum(), alpha=0.1)
        self.mean.lerp_(x.mean(0), 0.5)


@block(STATE)
class MeansOfItsScores(Counting):
    """A running mean of what its router finds, which a forward changes with gradients following it."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens_per_expert.mul_(0.9).add_(self.logits(x).softmax(-1).mean(0), alpha=0.1)
        return super(Counting, self).route(x)


@block(STATE)
class CountsInPlaces(Counting):
    dtype = torch.int64

    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))


@block(STATE, "writes to tokens_per_expert")
class CountsThroughAView(Counting):
    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert[1:] += loads[1:]


@block(STATE, "tokens_per_expert")
class CountsByAnotherName(Counting):
    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert.data.add_(loads)


@block(STATE, "batch size")
class CountsAllTokens(Counting):
    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert += x.shape[0]


@block(STATE, "depends on how many tokens")
class ALoadThatIsTooMuch(Counting):
    """What was counted decides what it does."""

    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert += loads

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed.where(self.tokens_per_expert.max() < 100, 0.0)


@block(STATE, "writes to gate.calls")
class ItsRouterCounts(Counting):
    """Others may call the router too, which counts as a call."""

    def make_more(self) -> None:
        super().make_more()
        self.gate.register_buffer("calls", torch.zeros(()))

    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.gate.calls += 1


@block(STATE, "no probe changes a buffer")
class CountsNothing(Counting):
    def count(self, x: Tensor, ids: Tensor, loads: Tensor) -> None:
        self.tokens_per_expert += loads * 0


class _Dispatcher:
    """No module: it remembers the shape of what it takes apart, and what went where, until it is put together again."""

    def apart(self, hidden_states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.shape = hidden_states.shape
        self.order = ids.flatten().argsort(stable=True)
        return hidden_states.reshape(-1, self.shape[-1])[self.order // ids.shape[-1]], ids.flatten()[self.order]

    def together(self, done: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(weights.shape[0], self.shape[-1], dtype=done.dtype, device=done.device)
        done = done * weights.flatten()[self.order, None]
        return out.index_add(0, self.order // weights.shape[-1], done).view(self.shape)


@block(STATE)
class WithADispatcher(Alone):
    """A plain object takes tokens apart and puts them together (Yuan 2, Megatron)."""

    dispatcher: type[_Dispatcher] = _Dispatcher

    def make_more(self) -> None:
        self.token_dispatcher = self.dispatcher()

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, ids = self.route(hidden_states.reshape(-1, self.hidden))
        tokens, ids = self.token_dispatcher.apart(hidden_states, ids)
        done = [self.expert(number, tokens[ids == number]) for number in range(self.num_experts)]
        return self.token_dispatcher.together(torch.cat(done), weights)


class _Inner(_Dispatcher):
    """It hands everything on to another object."""

    def __init__(self) -> None:
        self.inner = _Dispatcher()

    def apart(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.apart(*given)

    def together(self, *given: Tensor) -> Tensor:
        return self.inner.together(*given)


@block(STATE)
class WithADispatcherInAnother(WithADispatcher):
    dispatcher = _Inner


class _OfTheLastCall(_Dispatcher):
    calls = 0

    def together(self, *given: Tensor) -> Tensor:
        out = super().together(*given) * (1.0 + (self.calls > 100))
        self.calls += 1
        return out


@block(STATE, "state", "token_dispatcher.calls")
class WithADispatcherThatCounts(WithADispatcher):
    dispatcher = _OfTheLastCall


class _ReadsFirst(_Dispatcher):
    def apart(self, hidden_states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(self, "shape", None) is not None:
            hidden_states = hidden_states * 2
        return super().apart(hidden_states, ids)


@block(STATE, "state")
class WithADispatcherThatRemembers(WithADispatcher):
    dispatcher = _ReadsFirst


class _Configured(_Dispatcher):
    ready = False

    def apart(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        self.ready, self.tokens, self.scale = True, given[0].flatten(0, -2).shape, given[0].new_ones(())
        return super().apart(*given)


@block(STATE)
class WithADispatcherThatIsReadyOnceCalled(WithADispatcher):
    """An object isn't copied: to write to it before the block is called would be too early (Megatron)."""

    dispatcher = _Configured


@block(COUNTS)
class TokenAfterToken(Alone):
    """Each token by itself, a vector, in a loop over the batch (the plain form in textbooks)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for slot in range(ids.shape[1]):
                out[token] += weights[token, slot] * self.expert(int(ids[token, slot].item()), self.vector(x, token))
        return out.view(hidden_states.shape)

    def vector(self, x: Tensor, token: int) -> Tensor:
        return x[token]


@block(COUNTS, "not the block's input")
class TheTokenBefore(TokenAfterToken):
    def vector(self, x: Tensor, token: int) -> Tensor:
        return x[token - 1]


@block(COUNTS)
class TokenAfterTokenOfAView(TokenAfterToken):
    """It takes no batch that lies otherwise in memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.view(-1, self.hidden)).view(hidden_states.shape)


@block(COUNTS, "not the block's input")
class TheFirstOfManyTwice(TokenAfterTokenOfAView):
    def vector(self, x: Tensor, token: int) -> Tensor:
        return x[0] if token > 64 else x[token]


class _Bank(nn.Module):
    """Experts alone; it takes one tensor [E, T, H], as a block would."""

    def __init__(self, sizes: plain.Sizes) -> None:
        super().__init__()
        self.bank_experts = nn.ModuleList(plain.MLP(sizes.hidden, sizes.width) for _ in range(sizes.experts))

    def forward(self, inputs: Tensor) -> Tensor:
        chunks = inputs.chunk(len(self.bank_experts), dim=0)
        return torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.bank_experts, strict=True)])


class Gathering(nn.Module):
    """What its input is stands in no signature."""

    def __init__(self, sizes: plain.Sizes) -> None:
        super().__init__()
        self.gate, self.experts = plain.linear(sizes.hidden, sizes.experts), _Bank(sizes)

    def forward(self, *given: Tensor, **_: Tensor) -> Tensor:
        x = given[0].reshape(-1, given[0].shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        dense = torch.zeros(len(x), self.gate.out_features, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
        if given[1] is not None:
            dense = dense * given[1].reshape(-1, 1)
        done = self.experts(x.expand(self.gate.out_features, *x.shape))
        return torch.einsum("te,eth->th", dense, done).view(given[0].shape)


@module(PLACES)
class AroundOneThatGathers(nn.Module):
    """The bank takes one tensor and has nothing to route with; its router's module gathers all (DeepSpeed's layers)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.inner = Gathering(sizes)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Tensor:
        return self.inner(hidden_states, used_token)


@block(RESULTS)
class WithANewTensor(Alone):
    """A number of the dtype of what it computes."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states), hidden_states.new_tensor(0.5)


class SearchedAmongSorted(Alone):
    """Where each expert's tokens begin is searched for among sorted ids."""

    def ends(self, ordered: Tensor) -> Tensor:
        return torch.searchsorted(ordered, torch.arange(1, self.num_experts + 1))

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ordered, order = ids.flatten().sort(stable=True)
        out, start = torch.zeros_like(x), 0
        for number, end in enumerate(self.ends(ordered).tolist()):
            if start < end:
                places = order[start:end]
                rows = places // self.top_k
                out.index_add_(0, rows, self.expert(number, x[rows]) * weights.flatten()[places, None])
            start = end
        return out


@block(COUNTS)
class SearchesForEnds(SearchedAmongSorted):
    pass


@block(COUNTS, "how many tokens")
class SearchesForNoMoreThanThirty(SearchedAmongSorted):
    def ends(self, ordered: Tensor) -> Tensor:
        return super().ends(ordered).clamp(max=30)


ALL = forms.ALL  # those above among them
