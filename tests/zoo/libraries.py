"""Blocks in the manner of libraries that train experts (FastMoE, Tutel, DeepSpeed, MegaBlocks)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import absent
from .around import Alone, BiasedMLP
from .others import COUNTS, RESULTS, ROUTERS, STATE, block, module
from .plain import SIZES
from .repositories import FORMS

__all__ = ["ALL"]


# Attributes of tensors


class _Bearing(Alone):
    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        scores, (weights, ids) = self.logits(x).softmax(-1), self.route(x)
        out = self.routed(x, weights, ids).view(hidden_states.shape)
        return self.told(hidden_states, out, scores, ids)

    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        raise NotImplementedError


@block(RESULTS)
class LossOnItsOutput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        out.l_aux, out.experts = scores.mean(0).square().sum(), self.num_experts  # type: ignore[attr-defined]
        return out


@block(RESULTS)
class ChoicesOnAnOutputAmongOthers(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        out.chosen = {"ids": ids, "scores": scores}  # type: ignore[attr-defined]
        return out, scores


@block(RESULTS)
class ChoicesOnWhatItKeeps(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        scores.ids = ids  # type: ignore[attr-defined]
        self.scores = scores
        return out


@block(RESULTS)
class ABiasThatIsMarked(_Bearing):
    """What is told of a parameter is no result."""

    def make_more(self) -> None:
        self.bias = nn.Parameter(torch.zeros(self.hidden))
        self.bias.owner = type(self)  # type: ignore[attr-defined]

    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        return out, self.bias


@block(RESULTS, "puts attributes on its input (scores)")
class ScoresOnItsInput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        given.scores = scores  # type: ignore[attr-defined]
        return out


@block(RESULTS, "looks for an attribute (factor) of its input")
class AFactorOnItsInput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        return out * getattr(given, "factor", 1.0)


@block(RESULTS, "looks for an attribute (factor) of its input")
class AsksForAFactorOnItsInput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        return out * 2 if hasattr(given, "factor") else out


@block(RESULTS, "looks for the attributes of its input")
class AFactorAmongAllOfItsInput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        return out * vars(given).get("factor", 1.0)


@block(RESULTS, "also returns (kind) a type")
class AClassOnItsOutput(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        out.kind = type(self)  # type: ignore[attr-defined]
        return out


# Losses of products of sums over tokens, which are divided by their number twice


class _OfSums(_Bearing):
    def told(self, given: Tensor, out: Tensor, scores: Tensor, ids: Tensor) -> Any:
        tokens = int(scores.size(0))
        first = F.one_hot(ids[:, 0], self.num_experts).sum(0)
        return out, (scores.sum(0) * first).sum() * self.by(tokens)

    def by(self, tokens: int) -> float:
        return self.num_experts / (tokens * tokens)


@block(RESULTS)
class LossBySquares(_OfSums):
    pass


@block(RESULTS, "depends on the batch in a way that can't be followed")
class LossByCubes(_OfSums):
    def by(self, tokens: int) -> float:
        return self.num_experts / (tokens * tokens * tokens)


# Sorted tokens, and one matrix of all experts for each layer


class _Sorted(Alone):
    def make_experts(self) -> None:
        self.first = nn.Parameter(torch.randn(self.num_experts, self.width, self.hidden) * self.hidden**-0.5)
        self.last = nn.Parameter(torch.randn(self.num_experts, self.hidden, self.width) * self.width**-0.5)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        order = flat.sort().indices
        counts = torch.bincount(flat, minlength=self.num_experts)
        done = self.grouped(F.gelu(self.grouped(x[order // self.top_k], self.first, counts)), self.last, counts)
        back = torch.zeros_like(done).index_copy_(0, order, done).view(-1, self.top_k, self.hidden)
        return torch.bmm(weights[:, None], back)[:, 0]

    def grouped(self, x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        parts = self.taken(x, matrices).split(counts.tolist())
        return torch.cat([part @ matrix.t() for part, matrix in zip(parts, matrices, strict=True)])

    def taken(self, x: Tensor, matrices: Tensor) -> Tensor:
        return x


@block(COUNTS)
class TakenAsItsWeights(_Sorted):
    def taken(self, x: Tensor, matrices: Tensor) -> Tensor:
        return x.type_as(matrices)


@block(COUNTS)
class TakenToItsWeights(_Sorted):
    def taken(self, x: Tensor, matrices: Tensor) -> Tensor:
        return x.to(matrices)


class _Dispatcher:
    """Sorts tokens by expert, and keeps what it needs to put their outputs back (Megatron)."""

    def sent(self, x: Tensor, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.shape, flat = x.shape, x.reshape(-1, x.shape[-1])
        mask = torch.zeros_like(scores).int().scatter(1, ids, 1).bool()
        rows = mask.t().contiguous()
        self.places = torch.arange(len(flat)).expand(len(rows), -1).masked_select(rows)
        self.weights = scores.t().contiguous().masked_select(rows)
        return flat[self.places], mask.sum(0)

    def back(self, done: Tensor) -> Tensor:
        out = torch.zeros(self.shape[:-1].numel(), self.shape[-1], dtype=done.dtype)
        return out.index_add(0, self.places, done * self.weights[:, None]).view(self.shape)


@block(STATE)
class Dispatched(_Sorted):
    """It takes images too, as it takes anything."""

    def make_more(self) -> None:
        self.dispatcher = _Dispatcher()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() < 2:
            raise ValueError("no batch")
        scores = self.logits(hidden_states.reshape(-1, self.hidden)).softmax(-1)
        x, counts = self.dispatcher.sent(hidden_states, scores, scores.topk(self.top_k, -1).indices)
        return self.dispatcher.back(self.grouped(F.gelu(self.grouped(x, self.first, counts)), self.last, counts))


class _ShareOfColumns(Alone):
    """Of the columns of a batch it takes those that are this process's, of ``processes``."""

    processes = 1

    def forward(self, hidden_states: Tensor) -> Tensor:
        columns = hidden_states.shape[1]
        share = columns // self.processes
        mine = hidden_states[:, : min(share, columns)].contiguous()
        done = super().forward(mine)
        return done if self.processes == 1 else torch.cat([done, hidden_states[:, share:]], 1)


@block(COUNTS)
class ShareOfOneProcess(_ShareOfColumns):
    pass


@block(COUNTS, "compares numbers made of it")
class ShareOfOneOfTwo(_ShareOfColumns):
    processes = 2


# Weights of the chosen among all scores


class _Masked(Alone):
    """Scores of others are masked before the softmax."""

    def route(self, x: Tensor) -> Any:
        logits = self.logits(x)
        return self.masked(logits, logits.topk(self.top_k, -1).indices).softmax(-1), None

    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor | None) -> Tensor:
        return sum(weights[:, place, None] * expert(x) for place, expert in enumerate(self.experts))  # type: ignore[return-value]


@block(FORMS)
class MaskedByAdding(_Masked):
    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits + torch.full_like(logits, -torch.inf).scatter(-1, ids, 0.0)


@block(FORMS)
class MaskedByFilling(_Masked):
    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)
        return logits.masked_fill(~chosen, -torch.inf)


@block(FORMS, "routing weights are divided by")
class MaskedButTheBest(_Masked):
    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits + torch.full_like(logits, -torch.inf).scatter(-1, ids[:, :1], 0.0)


@block(FORMS, "other scores than the experts are ranked by")
class MaskedByLittle(_Masked):
    """Others have a weight too."""

    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits + torch.full_like(logits, -1.0).scatter(-1, ids, 0.0)


# Outputs of all experts, the last dimension being theirs


class _StackedLast(Alone):
    def make_experts(self) -> None:
        self.experts = nn.ModuleList(BiasedMLP(self.hidden, self.width) for _ in range(self.num_experts))

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        done = torch.stack([expert(x) for expert in self.experts], -1)
        dense = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(-1, ids, weights)
        return (done * self.dense(dense)).sum(-1)

    def dense(self, weights: Tensor) -> Tensor:
        return weights[:, None]


@block(FORMS)
class StackedLast(_StackedLast):
    pass


@block(FORMS, "output goes through vec(")
class StackedLastTheFirstElementTwice(_StackedLast):
    def dense(self, weights: Tensor) -> Tensor:
        return torch.cat([2 * weights[:, None], weights[:, None].expand(-1, self.hidden - 1, -1)], 1)


# Noise that is for training


class _Noisy(Alone):
    """Its logits have noise added, ``times`` so much."""

    def route(self, x: Tensor) -> Any:
        logits = self.logits(x)
        noisy = logits + self.noise(logits)
        weights, ids = noisy.topk(self.top_k, -1)
        return weights.softmax(-1), ids

    def noise(self, logits: Tensor) -> Tensor:
        return torch.randn_like(logits) * (0.1 * self.training)


@block(ROUTERS)
class NoiseTimesTraining(_Noisy):
    pass


@block(ROUTERS)
class NoiseOfItsOwnSizeTimesTraining(_Noisy):
    def noise(self, logits: Tensor) -> Tensor:
        return torch.rand_like(logits).reshape(logits.shape) * (F.softplus(logits) * self.training)


@block(ROUTERS, "draws random numbers (randn_like)")
class LittleNoise(_Noisy):
    def noise(self, logits: Tensor) -> Tensor:
        return torch.randn_like(logits) * 1e-6


@block(ROUTERS, "draws random numbers (rand_like)")
class NoiseBesideZero(_Noisy):
    def noise(self, logits: Tensor) -> Tensor:
        return torch.rand_like(logits) * 1e-6 + logits * (0.1 * self.training)


@block(ROUTERS, "draws random numbers (randn_like) that it doesn't use")
class NoiseForNothing(_Noisy):
    def noise(self, logits: Tensor) -> Tensor:
        return 0 * logits.new_zeros(torch.randn_like(logits).shape)


@block(ROUTERS, "draws random numbers (randn_like) for a tensor that lies as its input does")
class NoiseOfItsInput(_Noisy):
    def route(self, x: Tensor) -> Any:
        return super().route(x + torch.randn_like(x) * (0.1 * self.training))

    def noise(self, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits)


@block(ROUTERS, "draws random numbers (rand_like) for a tensor that lies as its input does")
class NoiseOfItsDoubledInput(NoiseOfItsInput):
    def forward(self, hidden_states: Tensor) -> Tensor:
        noise = torch.rand_like(hidden_states * 2) * (0.1 * self.training)
        return Alone.forward(self, hidden_states + noise)

    def route(self, x: Tensor) -> Any:
        return _Noisy.route(self, x)


# Rankings along another dimension than the last


class _Along(Alone):
    """Its scores are [B, E, S]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.chosen(self.logits(hidden_states).softmax(-1).transpose(1, 2))
        rows = [part.transpose(1, 2).reshape(len(x), -1) for part in (weights, ids)]
        return self.routed(x, rows[0], rows[1]).view(hidden_states.shape)

    def chosen(self, scores: Tensor) -> Any:
        return scores.topk(self.top_k, 1)


@block(ROUTERS)
class TheBestAlongTheSecond(_Along):
    pass


@block(ROUTERS)
class SortedAlongTheSecond(_Along):
    def chosen(self, scores: Tensor) -> Any:
        weights, ids = torch.sort(scores, dim=1, descending=True)
        return weights[:, : self.top_k], ids[:, : self.top_k]


@block(ROUTERS)
class TheOneBestAlongTheSecond(_Along):
    def chosen(self, scores: Tensor) -> Any:
        return scores.max(dim=1, keepdim=True)


@block(ROUTERS)
class TheOneBestAlongTheFirst(Alone):
    def route(self, x: Tensor) -> Any:
        scores = self.logits(x).t().sigmoid()
        ids = scores.argmax(0, keepdim=True)
        return scores.gather(0, ids).t(), ids.t()


# Experts that are told where tokens go by masks


class _Masked(nn.ModuleDict):
    def forward(self, x: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, mask in enumerate(masks.permute(2, 1, 0)):
            place, rows = torch.where(mask)
            out.index_add_(0, rows, self.done(str(number), x[rows]) * weights[rows, place, None])
        return out

    def done(self, name: str, x: Tensor) -> Tensor:
        return self[name](x)


class _MaskedWithNeighbours(_Masked):
    def done(self, name: str, x: Tensor) -> Tensor:
        return self[name](x) + self["0"](x)


class _DropsBehindMasks(nn.Module):
    """No expert takes more than four tokens of a row, the first ones (Switch Transformers)."""

    bank: type[_Masked] = _Masked

    def __init__(self) -> None:
        super().__init__()
        hidden = SIZES.hidden
        self.router = nn.Linear(hidden, SIZES.experts)
        self.experts = self.bank({str(e): BiasedMLP(hidden, SIZES.width) for e in range(SIZES.experts)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, ids = self.router(hidden_states).softmax(-1).max(-1)
        masks = F.one_hot(ids, SIZES.experts)
        masks = masks * (masks.cumsum(1) <= 4)
        x = hidden_states.reshape(-1, SIZES.hidden)
        out = self.experts(x, masks.view(-1, 1, SIZES.experts), weights.view(-1, 1))
        return out.view(hidden_states.shape)


@module(ROUTERS, at="experts")
class DropsBehindMasks(_DropsBehindMasks):
    pass


@module(ROUTERS, "depends on how many tokens an expert gets")
class DropsBehindMasksOfNeighbours(_DropsBehindMasks):
    bank = _MaskedWithNeighbours


# Choices for several tokens at once


@block(ROUTERS, "it chooses experts for several tokens at once, and not for each of them")
class ChoosesForTheWholeBatch(Alone):
    """Its experts are the best of all tokens' logits together, weighted for each token (SegMoE)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        ids = logits.sum(0).topk(self.top_k).indices
        weights = logits[:, ids].softmax(-1)
        parts = [weights[:, place, None] * self.experts[e](x) for place, e in enumerate(ids.tolist())]
        return sum(parts).view(hidden_states.shape)  # type: ignore[union-attr]


# Sorts in ascending order


class _Sorting(Alone):
    def route(self, x: Tensor) -> Any:
        scores = self.scores(x)
        ids = self.ids(scores)
        weights = scores.gather(-1, ids)
        return weights / weights.sum(-1, keepdim=True), ids

    def scores(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(-1)

    def ids(self, scores: Tensor) -> Tensor:
        return scores.argsort(-1)[:, -self.top_k :]


@block(ROUTERS)
class RankedInAscendingOrder(_Sorting):
    pass


@block(ROUTERS)
class RankedInAscendingOrderAndTurned(_Sorting):
    def ids(self, scores: Tensor) -> Tensor:
        return torch.argsort(scores, dim=1).flip(-1)[:, : self.top_k]


@block(ROUTERS)
class SortedInAscendingOrder(_Sorting):
    def route(self, x: Tensor) -> Any:
        weights, ids = self.scores(x).sort(dim=-1)
        return weights[:, -self.top_k :], ids[:, -self.top_k :]


@block(ROUTERS)
class RankedInAscendingOrderByCosine(_Sorting):
    def scores(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.gate.weight, dim=-1)).mul(5).softmax(-1)


@block(ROUTERS)
class RankedInAscendingOrderAndTold(_Sorting):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.route(hidden_states.reshape(-1, self.hidden))


@block(ROUTERS)
class RankedByTheirNegatives(_Sorting):
    def ids(self, scores: Tensor) -> Tensor:
        return (-scores).argsort(-1)[:, : self.top_k]


@block(ROUTERS)
class TheLowestInAscendingOrder(_Sorting):
    def ids(self, scores: Tensor) -> Tensor:
        return scores.argsort(-1)[:, : self.top_k]


@block(ROUTERS)
class TheLastInDescendingOrder(_Sorting):
    def ids(self, scores: Tensor) -> Tensor:
        return scores.argsort(-1, descending=True)[:, -self.top_k :]


# Experts of one matrix that are gated by half of what it makes


@block(FORMS)
class GatedByHalf(Alone):
    def make_experts(self) -> None:
        def expert() -> nn.Module:
            return nn.Sequential(nn.Linear(self.hidden, 2 * self.width), nn.GLU(), nn.Linear(self.width, self.hidden))

        self.experts = nn.ModuleList(expert() for _ in range(self.num_experts))


@block(FORMS, "between its maps stands")
class GatedByHalfTwice(Alone):
    def make_experts(self) -> None:
        def expert() -> nn.Module:
            first, last = nn.Linear(self.hidden, 4 * self.width), nn.Linear(self.width, self.hidden)
            return nn.Sequential(first, nn.GLU(), nn.GLU(), last)

        self.experts = nn.ModuleList(expert() for _ in range(self.num_experts))


# Factors that are there twice


@block(FORMS, "between its maps stands (sigmoid(")
class SigmoidTwice(Alone):
    def act(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(x)


ALL = absent.ALL  # those above among them
