"""Blocks in the manner of training repositories, beside those in :mod:`zoo.published`. Near misses have ``words``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import published
from .around import Alone, BiasedMLP
from .others import COUNTS, RESULTS, STATE, block

__all__ = ["ALL"]

FORMS = "forms"


class _Balanced(Alone):
    """It returns a loss by its tokens' number (CuMo, DeepSpeed, fairseq)."""

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        scores, (_, ids) = self.logits(x).softmax(-1), self.route(x)
        loads = F.one_hot(ids, self.num_experts).sum((0, 1))
        return super().forward(hidden_states), self.loss(x, loads, scores)

    def loss(self, x: Tensor, loads: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError


@block(RESULTS)
class LossByFloats(_Balanced):
    def loss(self, x: Tensor, loads: Tensor, scores: Tensor) -> Tensor:
        tokens = float(x.shape[0])
        return (loads.float() / tokens * scores.sum(0) / float(x.shape[0] * self.top_k)).sum() * float(self.num_experts)


@block(RESULTS)
class LossByQuotients(_Balanced):
    def loss(self, x: Tensor, loads: Tensor, scores: Tensor) -> Tensor:
        return (loads * (self.num_experts / x.shape[0]) * (scores.sum(0) / (x.size(0) / 2.5))).sum() * (1.0 / len(x))


@block(STATE)
class KeepsALossByFloats(_Balanced):
    def forward(self, hidden_states: Tensor) -> Any:
        out, self.aux_loss = super().forward(hidden_states)
        return out

    def loss(self, x: Tensor, loads: Tensor, scores: Tensor) -> Tensor:
        return (loads * scores.mean(0)).sum() / float(hidden_tokens(x))


def hidden_tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


@block(RESULTS, "batch size")
class OutputByItsTokens(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (8 / float(hidden_states.shape[0]))


@block(RESULTS, "batch size")
class LossByALogarithm(_Balanced):
    def loss(self, x: Tensor, loads: Tensor, scores: Tensor) -> Tensor:
        return scores.sum() / (float(x.shape[0]) + 1.0)


class _Capacity(Alone):
    """How many tokens an expert takes is calculated, whether it is asked for or not (DeepSpeed)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        most = max(math.ceil(x.shape[0] / self.num_experts * 1.25), 4)
        return self.limited(x, weights, ids, int(most))

    def limited(self, x: Tensor, weights: Tensor, ids: Tensor, most: int) -> Tensor:
        return super().routed(x, weights, ids)


@block(COUNTS)
class CapacityThatNoOneAsksFor(_Capacity):
    pass


@block(COUNTS, "batch size", "how many tokens")
class CapacityThatDropsTokens(_Capacity):
    def limited(self, x: Tensor, weights: Tensor, ids: Tensor, most: int) -> Tensor:
        chosen = F.one_hot(ids, self.num_experts)
        place = (chosen.sum(1).cumsum(0) * chosen.sum(1)).gather(1, ids)
        return super().limited(x, weights * (place <= most).to(x.dtype), ids, most)


@block(COUNTS, "batch size")
class NothingForManyTokens(_Capacity):
    def limited(self, x: Tensor, weights: Tensor, ids: Tensor, most: int) -> Tensor:
        out = super().limited(x, weights, ids, most)
        return out if float(x.shape[0]) / 2 < 100 else torch.zeros_like(out)


# Attributes that hold several values


class _Keeping(Alone):
    """What it found is left in a dict or list of its own."""

    def make_more(self) -> None:
        self.stats: dict[Any, Any] = {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        self.keep(self.logits(x), self.route(x)[1])
        return super().forward(hidden_states)

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        raise NotImplementedError


@block(STATE)
class KeepsADict(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.losses = {"z": logits.logsumexp(-1).square().mean(), "count": 0, "none": logits.new_zeros(2)}


@block(STATE)
class KeepsAListInATuple(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.last = [ids, (logits, "as they are")]


@block(STATE)
class KeepsUnderNames(_Keeping):
    """Its dict is the same after every call, and has other values (fairseq)."""

    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.stats["loads"] = torch.bincount(ids.flatten(), minlength=self.num_experts)
        self.stats["z"] = logits.logsumexp(-1).mean()
        self.stats["kept"] = True


@block(STATE, "keeps state between calls (stats")
class CountsUnderAName(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.stats["calls"] = self.stats.get("calls", 0) + 1


@block(STATE, "keeps state between calls (stats")
class AddsUpUnderAName(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.stats["z"] = self.stats.get("z", 0.0) + logits.logsumexp(-1).mean()


@block(STATE, "keeps state between calls (stats")
class KeepsMoreAndMore(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.stats[f"{len(self.stats)}"] = logits


@block(STATE, "keeps state between calls (stats")
class OtherwiseOnceAName(_Keeping):
    def keep(self, logits: Tensor, ids: Tensor) -> None:
        self.stats["known"] = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = 2.0 if "known" in self.stats else 1.0
        return super().forward(hidden_states) * factor


class _KeepingSizes(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        self.note(hidden_states)
        return super().forward(hidden_states)

    def note(self, x: Tensor) -> None:
        raise NotImplementedError


@block(STATE)
class KeepsItsInputsSizes(_KeepingSizes):
    """Numbers of tokens, rows and choices of the last call, and two that are no such numbers (Megatron)."""

    def note(self, x: Tensor) -> None:
        self.tokens = int(x.reshape(-1, self.hidden).shape[0])
        self.rows, self.last = x.shape[0], x.shape[-2]
        self.chosen, self.choices, self.one = self.tokens * self.top_k, self.top_k, 1


@block(STATE, "its attribute label would be answered by one of the replacement's own")
class KeepsWhatTheReplacementHas(_KeepingSizes):
    def note(self, x: Tensor) -> None:
        self.label = x.shape[0]


@block(STATE, "keeps state between calls (seen")
class AddsUpItsTokens(_KeepingSizes):
    seen = 0

    def note(self, x: Tensor) -> None:
        self.seen = self.seen + x.shape[0]


@block(STATE, "state", "differ", "batch size")
class KeepsHalfOfItsTokens(_KeepingSizes):
    def note(self, x: Tensor) -> None:
        self.half = x.reshape(-1, self.hidden).shape[0] // 2


# Weights that a call converts


@block(STATE)
class ConvertsItsBias(Alone):
    """A vector beside the router is made float32 when it is called, where it is another (Megatron)."""

    def make_more(self) -> None:
        self.register_buffer("shift", torch.linspace(-0.2, 0.2, self.num_experts))

    def logits(self, x: Tensor) -> Tensor:
        self.convert()
        return super().logits(x) + self.shift.to(x.dtype)

    def convert(self) -> None:
        if self.shift.dtype != torch.float32:
            self.shift.data = self.shift.data.to(torch.float32)


@block(STATE)
class ConvertsWhatIsConverted(ConvertsItsBias):
    def convert(self) -> None:
        self.shift.data = self.shift.data.to(torch.float32)


@block(STATE, "exchanges the data of shift")
class DoublesItsBias(ConvertsItsBias):
    def convert(self) -> None:
        self.shift.data = self.shift.data * 2


@block(STATE, "exchanges the data of shift", "nor one of its own weights")
class ExchangesItsBias(ConvertsItsBias):
    def convert(self) -> None:
        self.shift.data = self.gate.weight.data[:, 0].clone()


# One expert, with no weight


class _Unweighted(Alone):
    """Each token's best expert, as it is (a Switch that doesn't scale by probabilities)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        return self.summed(x, self.logits(x).argmax(-1)).view(hidden_states.shape)

    def summed(self, x: Tensor, best: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            out[best == number] = self.expert(number, x[best == number])
        return out


@block(FORMS)
class TheBestAsItIs(_Unweighted):
    pass


@block(FORMS)
class TheBestOfBiasedAsItIs(_Unweighted):
    def make_expert(self) -> nn.Module:
        return BiasedMLP(self.hidden, self.width)


@block(FORMS, "no routed experts (weights of a top-k times an MLP)")
class TheBestAndAnother(_Unweighted):
    """A shared expert can't be told from it."""

    def make_more(self) -> None:
        self.always = self.make_expert()

    def summed(self, x: Tensor, best: Tensor) -> Tensor:
        return super().summed(x, best) + self.always(x)


@block(FORMS, "no routed experts (weights of a top-k times an MLP)")
class TheBestDoubled(_Unweighted):
    def summed(self, x: Tensor, best: Tensor) -> Tensor:
        return super().summed(x, best) * 2


@block(FORMS, "experts")
class TheFirstWhateverIsBest(_Unweighted):
    def summed(self, x: Tensor, best: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            out[best == number] = self.expert(0, x[best == number])
        return out


# The best, and then the best of the rest


class _BestAndNext(Alone):
    """Two maxima, the second without the first, and dense weights (GShard, fairseq, DeepSpeed, NLLB)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        scores = logits.softmax(-1)
        first = F.one_hot(scores.argmax(-1), self.num_experts)
        second = F.one_hot(self.rest(logits, scores, first).argmax(-1), self.num_experts)
        weights = [(scores * mask).sum(-1) for mask in (first, second)]
        whole = torch.clamp(weights[0] + weights[1], min=torch.finfo(scores.dtype).eps)
        dense = sum(mask * (weight / whole)[:, None] for mask, weight in zip((first, second), weights, strict=True))
        out, sent = torch.zeros_like(x), (first + second).bool()
        for number, expert in enumerate(self.experts):
            rows = torch.where(sent[:, number])[0]
            out.index_add_(0, rows, expert(x[rows]) * dense[rows, number, None])
        return out.view(hidden_states.shape)

    def rest(self, logits: Tensor, scores: Tensor, first: Tensor) -> Tensor:
        return logits.masked_fill(first.bool(), float("-inf"))


@block(FORMS)
class BestAndNextByLogits(_BestAndNext):
    pass


@block(FORMS)
class BestAndNextInPlace(_BestAndNext):
    """Outputs take the place of inputs, in a copy of the batch for each expert (NLLB)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        scores = logits.softmax(-1)
        first = F.one_hot(scores.argmax(-1), self.num_experts)
        second = F.one_hot(self.rest(logits, scores, first).argmax(-1), self.num_experts)
        weights = [(scores * mask).sum(-1) for mask in (first, second)]
        whole = torch.clamp(weights[0] + weights[1], min=torch.finfo(scores.dtype).eps)
        one, other = (weight / whole for weight in weights)
        dense = first * one[:, None] + second * other[:, None]
        sent = dense.bool()
        copies = torch.einsum("th,te->eth", x, sent.to(x.dtype))
        for number, expert in enumerate(self.experts):
            rows = sent[:, number]
            done = torch.einsum("t,th->th", dense[rows, number], expert(copies[number, rows]))
            copies[number, rows] = done
        return copies.sum(0).view(hidden_states.shape)


@block(FORMS)
class BestAndNextByScores(_BestAndNext):
    def rest(self, logits: Tensor, scores: Tensor, first: Tensor) -> Tensor:
        return scores * (1 - first)


@block(FORMS, "routing weights are")
class BestAndNextAmongZeros(_BestAndNext):
    """Logits may be below zero, which is what is left of the first."""

    def rest(self, logits: Tensor, scores: Tensor, first: Tensor) -> Tensor:
        return logits * (1 - first)


@block(FORMS, "routing weights are", "expert 1 is none")
class BestAndBestButOne(_BestAndNext):
    """What is left out isn't what was chosen."""

    def rest(self, logits: Tensor, scores: Tensor, first: Tensor) -> Tensor:
        return logits.masked_fill(first.flip(-1).bool(), float("-inf"))


class _DenseLoads(_BestAndNext):
    """Slots for as many tokens as the greatest load, counted by both choices (DeepSpeed that drops nothing)."""

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        scores = logits.softmax(-1)
        most = max(math.ceil(len(x) / self.num_experts * 2), 4)
        first = F.one_hot(scores.argmax(-1), self.num_experts)
        second = F.one_hot(self.rest(logits, scores, first).argmax(-1), self.num_experts)
        places = [first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)]
        loss = (scores.mean(0) * first.float().mean(0)).mean() * self.num_experts**2
        if self.drops:
            first, second = (mask * (place < most) for mask, place in zip((first, second), places, strict=True))
        else:
            most = (first + second).sum(0).max()
        weights = [(scores * mask).sum(-1) for mask in (first, second)]
        whole = torch.clamp(weights[0] + weights[1], min=torch.finfo(scores.dtype).eps)
        slots = [F.one_hot((p * m).sum(-1), most).float() for p, m in zip(places, (first, second), strict=True)]
        combined = sum(
            torch.einsum("se,sc->sec", torch.einsum("s,se->se", weight / whole, mask.float()), slot)
            for weight, mask, slot in zip(weights, (first, second), slots, strict=True)
        )
        given = torch.einsum("sec,sm->ecm", combined.bool().type_as(x), x)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given, strict=True)])
        return torch.einsum("sec,ecm->sm", combined.type_as(x), done).view(hidden_states.shape), loss

    drops = False


@block(COUNTS)
class SlotsForBoth(_DenseLoads):
    pass


@block(COUNTS, "how many tokens")
class SlotsForSomeOfBoth(_DenseLoads):
    drops = True


# Questions to what it computes


class _Asking(Alone):
    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        if self.strange(out):
            raise FloatingPointError("not finite")
        return out

    def strange(self, out: Tensor) -> Any:
        raise NotImplementedError


@block(COUNTS, "it asks whether what it computes is finite")
class AsksWhetherAllIsFinite(_Asking):
    def strange(self, out: Tensor) -> Any:
        return not torch.isfinite(out).all()


@block(COUNTS, "it asks whether what it computes is finite")
class AsksWhetherAnyIsNone(_Asking):
    def strange(self, out: Tensor) -> Any:
        return torch.isnan(out).any() or torch.isinf(out).any()


@block(COUNTS, "depends on the values it computes")
class AsksWhetherAnyIsLarge(_Asking):
    def strange(self, out: Tensor) -> Any:
        return (torch.isfinite(out) & (out.abs() > 1e6)).any()


# Einsums of three


class _CombinedAtOnce(Alone):
    """Slots, scores and outputs meet in one einsum, over slots and experts (GShard's ports)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        sent = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, ids, 1.0)
        places = ((sent.cumsum(0) - 1) * sent).long()
        slots = F.one_hot(places, len(x)).to(x.dtype) * sent[..., None]
        dense = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, ids, weights)
        given = torch.einsum("tec,th->ech", slots, x)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given, strict=True)])
        return torch.einsum("ech,tec,te->th", done, slots, self.taken(dense))

    def taken(self, dense: Tensor) -> Tensor:
        return dense


@block(FORMS)
class CombinedAtOnce(_CombinedAtOnce):
    pass


@block(FORMS)
class TheirFirstElementTwice(_CombinedAtOnce):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = super().routed(x, weights, ids)
        return torch.cat([2 * out[:, :1], out[:, 1:]], -1)


class _MaskOfThree(Alone):
    """Weights, choices and slots meet in one einsum, and where that isn't zero tokens are sent."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen = F.one_hot(ids, self.num_experts).to(x.dtype)
        flat = chosen.reshape(-1, self.num_experts)
        places = (flat.cumsum(0) * flat).view(chosen.shape) - 1
        slots = F.one_hot(places.amax(-1).long(), self.most(chosen)).to(x.dtype)
        combined = torch.einsum("tk,tke,tkc->tec", weights, chosen, slots)
        given = torch.einsum("tec,th->ech", (combined > 0).to(x.dtype), x)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, given, strict=True)])
        return torch.einsum("tec,ech->th", combined, done)

    def most(self, chosen: Tensor) -> int:
        return int(chosen.sum((0, 1)).max())


@block(COUNTS)
class MaskOfThree(_MaskOfThree):
    pass


@block(COUNTS)
class MaskOfThreeByItem(_MaskOfThree):
    def most(self, chosen: Tensor) -> int:
        return int(chosen.sum((0, 1)).max().item())


ALL = published.ALL  # those above among them
