"""Blocks of the forms that published model code has, beside those in :mod:`zoo.written`. Near misses have ``words``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import written
from .around import AROUND, Alone, BiasedMLP, Latent
from .others import ACTIVATIONS, PLACES, RESULTS, block

__all__ = ["ALL"]


class _Compiled(Alone):
    """Its routing weights are made by a function that is compiled whole: nothing may stand between its operations."""

    def make_more(self) -> None:
        self.whole = torch.compile(lambda logits: F.softmax(logits, dim=-1), fullgraph=True, backend="eager")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights: tuple[Tensor, Tensor] = self.whole(self.logits(x)).topk(self.top_k, dim=-1)
        return weights


@block(PLACES)
class Compiled(_Compiled):
    """As the activations of NeMo AutoModel's experts are."""


@block(PLACES, "random numbers")
class CompiledAndLeft(_Compiled):
    """It is called as before after it was looked at."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x, weights, ids) + 0 * torch.rand(1)


@block(AROUND)
class LatentRowsGathered(Latent):
    """A smaller input whose rows are gathered number by number, and added up so (NeMo AutoModel)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        given = self.entering(x)
        out = torch.zeros_like(given)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            places = token[:, None].expand(-1, given.shape[1])
            done = self.expert(number, given.gather(0, self.taken(places))) * weights[token, slot, None]
            out.scatter_add_(0, places, done)
        return self.out_of(out)

    def taken(self, places: Tensor) -> Tensor:
        return places


@block(AROUND, "input of a linear map")
class LatentOfOtherTokens(LatentRowsGathered):
    def taken(self, places: Tensor) -> Tensor:
        return places.flip(0)


class _ByTanh(BiasedMLP):
    """The GELU of GPT-2, of a sum with a bias (phixtral)."""

    cube = 0.044715

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + self.cube * torch.pow(y, 3.0)))))


class _NearlyByTanh(_ByTanh):
    cube = 0.05


@block(PLACES)
class IntAsADtype(Alone):
    """Python's own, where code also asks it for whole numbers of the batch elsewhere."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in torch.arange(self.num_experts, dtype=int).tolist():  # type: ignore[call-overload]
            token, slot = torch.where(ids == number)
            out[token] += self.expert(number, x[token]) * weights[token, slot, None]
        return out


@block(AROUND)
class MixedByTwoNumbers(IntAsADtype):
    """Experts and a shared one with biases, each times a number; other layouts take other operations."""

    def make_more(self) -> None:
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7))
        self.always = BiasedMLP(self.hidden, self.width)

    def make_expert(self) -> nn.Module:
        return BiasedMLP(self.hidden, self.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.beta * super().forward(hidden_states) + self.alpha * self.always(hidden_states)


@block(AROUND)
class TheBestWithoutAWeight(Alone):
    def make_expert(self) -> nn.Module:
        return BiasedMLP(self.hidden, self.width)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        best, out = self.logits(x).argmax(-1), torch.zeros_like(x)
        for number in range(self.num_experts):
            out[best == number] = self.expert(number, x[best == number])
        return out


@block(AROUND, "no routed experts (weights of a top-k times an MLP)", "told from")
class TheBestTwiceWithoutAWeight(TheBestWithoutAWeight):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return 2 * super().routed(x, weights, ids)


@block(ACTIVATIONS)
class GeluOfBiased(Alone):
    mlp: type[BiasedMLP] = _ByTanh

    def make_expert(self) -> nn.Module:
        return self.mlp(self.hidden, self.width)


@block(ACTIVATIONS, "not down(act(gate(x)) * up(x))")
class NearlyGeluOfBiased(GeluOfBiased):
    mlp = _NearlyByTanh


@block(RESULTS, "rows) comes of numbers of single tokens' places")
class WithItsSortedRows(Alone):
    """Its tokens in the order of their experts (a reference of Unsloth's)."""

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        x = hidden_states.reshape(-1, self.hidden)
        _, ids = self.route(x)
        given = x[ids.flatten().argsort(stable=True) // self.top_k]
        rows = torch.zeros_like(given)
        start = torch.zeros((), dtype=torch.long)
        for number in range(self.num_experts):
            end = start + (ids == number).sum()
            rows[start:end] = given[start:end] * number
            start = end
        return {"out": super().forward(hidden_states), "rows": rows}


ALL = written.ALL  # those above among them
