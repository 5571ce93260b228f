"""Blocks with more around their routed experts than a router and a shared expert: norms, residuals, learned mixes.

Near misses have ``words``, as in :mod:`zoo.others`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import others, plain
from .others import block, module
from .plain import Base

AROUND = "around"


class RootMeanSquare(nn.Module):
    """A norm that computes in float32."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class BiasedMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


class Alone(Base):
    """No shared expert but those that a block makes for itself."""

    def make_shared(self) -> None: ...

    def shared(self, x: Tensor) -> None:
        return None


@block(AROUND)
class NormBeforeAndResidual(Base):
    def make_more(self) -> None:
        self.norm = RootMeanSquare(self.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + super().forward(self.norm(hidden_states))


@block(AROUND)
class ViewsItsInput(Alone):
    """It takes no input that isn't contiguous."""

    def make_more(self) -> None:
        self.norm = RootMeanSquare(self.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states).view(-1, self.hidden)
        weights, ids = self.route(x)
        return hidden_states + self.routed(x, weights, ids).view(hidden_states.shape)


class _AddingTheirInput(Alone):
    """What experts add to their input is added up with it."""

    def expert(self, number: int, x: Tensor) -> Tensor:
        return super().expert(number, x) + (x if self.adds(number) else 0.0)

    def adds(self, number: int) -> bool:
        return True


@block(AROUND)
class ExpertsThatAddTheirInput(_AddingTheirInput):
    pass


@block(AROUND)
class AdaptersOfASharedExpert(_AddingTheirInput):
    """They are given what another MLP makes, and the router isn't."""

    def make_more(self) -> None:
        self.whole = plain.MLP(self.hidden, self.shared_width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        return self.routed(self.whole(x), *self.route(x)).view(hidden_states.shape)


@block(AROUND, "differ in what they add")
class ExpertsOfWhichSomeAddTheirInput(_AddingTheirInput):
    def adds(self, number: int) -> bool:
        return number % 2 == 0


@block(AROUND)
class NormsOnBothSides(Base):
    def make_more(self) -> None:
        self.before, self.after = nn.LayerNorm(self.hidden), RootMeanSquare(self.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.after(super().forward(self.before(hidden_states)))


@block(AROUND)
class NormForItsExpertsAlone(Alone):
    """Its router and its shared expert are given the block's input."""

    def make_more(self) -> None:
        self.norm, self.beside = nn.LayerNorm(self.hidden), BiasedMLP(self.hidden, self.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        return (self.routed(self.norm(x), weights, ids) + self.beside(x)).reshape(hidden_states.shape)


@block(AROUND)
class TwoSharedExperts(Alone):
    def make_more(self) -> None:
        self.others = nn.ModuleList([plain.MLP(self.hidden, self.width), BiasedMLP(self.hidden, self.width)])

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + sum(other(x) for other in self.others)


@block(AROUND)
class TwoSharedAndWeightsByMasks(TwoSharedExperts):
    """Of a token, an expert takes all weights, and leaves out those of others by a mask."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            mine = ids == number
            token = mine.any(-1)
            weight = (weights[token] * mine[token].to(weights.dtype)).sum(-1, keepdim=True)
            out[token] += self.expert(number, x[token]) * weight
        return out


@block(AROUND)
class MixedByCoefficients(Alone):
    """The dense expert and the routed ones, weighted by a softmax of the token."""

    def make_more(self) -> None:
        self.dense, self.coefficient = plain.MLP(self.hidden, self.width), nn.Linear(self.hidden, 2)

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        mix = self.coefficient(x).softmax(-1)
        return routed * mix[:, :1] + self.dense(x) * mix[:, 1:]


@block(AROUND)
class SharesWhatIsLeft(Alone):
    def make_more(self) -> None:
        self.dense, self.coefficient = plain.MLP(self.hidden, self.width), plain.linear(self.hidden, 1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(hidden_states), self.gate(hidden_states)

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        part = self.coefficient(x).sigmoid()
        return routed * (1 - part) + self.dense(x) * part


class Latent(Base):
    """Experts of half the hidden size, between projections that they share."""

    def make_experts(self) -> None:
        size, self.hidden = self.hidden, self.hidden // 2
        super().make_experts()
        self.into, self.out_of = plain.linear(size, self.hidden), plain.linear(self.hidden, size)
        self.hidden = size

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.out_of(super().routed(self.entering(x), weights, ids))

    def entering(self, x: Tensor) -> Tensor:
        return self.into(x)


@block(AROUND)
class SharesItsLatent(Latent):
    pass


@block(AROUND)
class LatentWithANorm(Latent):
    def make_more(self) -> None:
        self.norm = RootMeanSquare(self.hidden // 2)

    def entering(self, x: Tensor) -> Tensor:
        return self.norm(self.into(x))


@block(AROUND, "other tokens")
class LatentOfAnotherToken(Latent):
    def entering(self, x: Tensor) -> Tensor:
        return self.into(x).roll(1, 0)


@block(AROUND, "input of a linear map")
class TwoLatents(Latent):
    """Half of the experts are given another one."""

    def make_more(self) -> None:
        self.other = plain.linear(self.hidden, self.hidden // 2)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        given = [self.into(x), self.other(x)]
        out = torch.zeros_like(given[0])
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            out.index_add_(0, rows, expert(given[number % 2][rows]) * weights[rows, slots, None])
        return self.out_of(out)


@module(AROUND)
class OneExpertOfOneLayerLess(nn.Module):
    """Top-1 of experts without gates or biases, by a router of its own: few mistakes can be made in it."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.gate = plain.linear(sizes.hidden, sizes.experts)
        self.first = plain.parameter(sizes.experts, sizes.hidden, sizes.width)
        self.last = plain.parameter(sizes.experts, sizes.width, sizes.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = torch.tanh(self.gate(F.normalize(x, dim=-1))).exp().topk(1, dim=-1)
        out = torch.zeros_like(x)
        for number in range(len(self.first)):
            rows, _ = torch.where(ids == number)
            out[rows] = F.relu(x[rows] @ self.first[number]) @ self.last[number] * weights[rows]
        return out.reshape(hidden_states.shape)


@block(AROUND, "other tokens")
class LessItsMean(Alone):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed - routed.mean(0, keepdim=True)


@block(AROUND, "other tokens")
class ByTheLargestOfAll(Alone):
    """The largest values of two batches of one scale are nearly the same."""

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return F.layer_norm(routed / routed.abs().max() + x, (self.hidden,))


@block(AROUND, "to its experts' output", "other tokens")
class ResidualOfAnotherToken(Alone):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed + x.flip(0)


@block(AROUND, "used in two places", "its experts'")
class FirstExpertForAll(Alone):
    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return torch.tanh(routed) + self.experts[0](x)


@block(AROUND, "native_layer_norm")
class NormsForSomeExperts(Base):
    """Half of the experts are given something else."""

    def make_more(self) -> None:
        self.norm = nn.LayerNorm(self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out, normed = torch.zeros_like(x), self.norm(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            given = normed if number % 2 else x
            out.index_add_(0, rows, expert(given[rows]) * weights[rows, slots, None])
        return out


@block(AROUND, "how many tokens")
class ScaledByTheLoad(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        loads = torch.bincount(ids.flatten(), minlength=self.num_experts)
        return torch.tanh(super().routed(x, weights, ids)) * loads.max()


ALL = others.CASES  # those above among them
