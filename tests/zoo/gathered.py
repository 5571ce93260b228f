"""Blocks of the forms of training libraries, beside those in :mod:`zoo.repositories`. Near misses have ``words``."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import plain, repositories, written
from .around import Alone
from .others import ACTIVATIONS, COUNTS, PLACES, VALUE, block, module

__all__ = ["ALL"]


@torch.jit.script
def _swiglu(joined: Tensor) -> Tensor:
    gate, up = torch.chunk(joined, 2, dim=-1)
    return F.silu(gate) * up


@torch.jit.script
def _swiglu_of_its_own(joined: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return 2 * _swiglu(joined)
    return _swiglu(joined)


class _JoinedMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.first, self.last = plain.linear(hidden, 2 * width), plain.linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_swiglu(self.first(x)))


class _OfItsOwn(_JoinedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(_swiglu_of_its_own(self.first(x)))


@block(ACTIVATIONS)
class ScriptedActivation(Alone):
    """An activation in TorchScript (Megatron's and its descendants')."""

    mlp: type[_JoinedMLP] = _JoinedMLP

    def make_expert(self) -> nn.Module:
        return self.mlp(self.hidden, self.width)


@block(ACTIVATIONS)
class HoldsAScriptedActivation(ScriptedActivation):
    class mlp(_JoinedMLP):
        def __init__(self, hidden: int, width: int) -> None:
            super().__init__(hidden, width)
            self.act = _swiglu

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x)))


@block(ACTIVATIONS, "TorchScript")
class OtherwiseInScript(ScriptedActivation):
    """Its script does something else than its Python."""

    mlp = _OfItsOwn


class StraightThrough(Alone):
    """The chosen experts' sum, with the gradients of the sum of all (DenseMixer's blocks)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        scores, every = self.logits(x).softmax(-1), torch.zeros_like(x)
        for number in range(self.num_experts):
            every = every + self.expert(number, x) * scores[:, number, None]
        return (self.routed(x, weights, ids).detach() + (every - self.without(every))).view_as(hidden_states)

    def without(self, every: Tensor) -> Tensor:
        return every.detach()


@block(VALUE)
class GradientsOfAll(StraightThrough):
    pass


@block(VALUE, "which is its experts")
class HalfOfAllBeside(StraightThrough):
    def without(self, every: Tensor) -> Tensor:
        return 0.5 * every


class SlotsOfEqualSize(Alone):
    """Every expert has as many slots as the greatest load; a slot beyond them is for what isn't sent (DeepSpeed)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], self.num_experts, dtype=torch.bool).scatter(1, ids, True)
        most = int(mask.sum(0).max())
        places = mask.cumsum(0) - 1
        slots = self.kept(ids, ids * most + places.gather(1, ids), self.num_experts * most)
        source = torch.full((self.num_experts * most + 1,), x.shape[0])
        source.scatter_(0, slots.flatten(), torch.arange(x.shape[0])[:, None].expand_as(slots).flatten())
        given = torch.cat([x, x.new_zeros(1, self.hidden)])[source[:-1]].view(self.num_experts, most, self.hidden)
        done = torch.cat([self.expert(number, given[number]) for number in range(self.num_experts)])
        done = torch.cat([done, done.new_zeros(1, self.hidden)])[slots.flatten()]
        return (done.view(*ids.shape, self.hidden) * weights[..., None]).sum(1)

    def kept(self, ids: Tensor, slots: Tensor, beyond: int) -> Tensor:
        return torch.where(ids >= 0, slots, torch.full_like(slots, beyond))


@block(COUNTS)
class AllAreSent(SlotsOfEqualSize):
    pass


@block(COUNTS)
class BestAndSecondBest(SlotsOfEqualSize):
    """One choice after the other by a router of its own, with their weights one above the other (DeepSpeed's top-2)."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x.tanh())

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        logits = self.logits(x)
        scores, first = logits.softmax(-1), logits.argmax(-1)
        second = logits.masked_fill(F.one_hot(first, self.num_experts).bool(), float("-inf")).argmax(-1)
        ids = torch.stack([first, second])
        mine = torch.stack([(scores * F.one_hot(number, self.num_experts)).sum(-1) for number in ids])
        return self.joined(x, mine / mine.sum(0).clamp(min=1e-7), ids).view_as(hidden_states)

    def joined(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        done = torch.zeros_like(x)
        for slot in range(2):
            for number in range(self.num_experts):
                token = torch.where(ids[slot] == number)[0]
                done.index_add_(0, token, self.expert(number, x[token]) * weights[slot, token, None])
        return done


@block(COUNTS, "for token 0, elsewhere another")
class BestWeighedAsSecond(BestAndSecondBest):
    def joined(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().joined(x, weights.roll(1, 1), ids)


@block(COUNTS, "how many tokens", "differently")
class FirstTwentyAreSent(SlotsOfEqualSize):
    def kept(self, ids: Tensor, slots: Tensor, beyond: int) -> Tensor:
        return torch.where(torch.arange(len(ids))[:, None] < 20, slots, torch.full_like(slots, beyond))


@block(COUNTS, "experts")
class LastExpertIsSentNothing(SlotsOfEqualSize):
    def kept(self, ids: Tensor, slots: Tensor, beyond: int) -> Tensor:
        return torch.where(ids < self.num_experts - 1, slots, torch.full_like(slots, beyond))


@module(PLACES, at="inner")
class BesideOneThatGathers(nn.Module):
    """The router's module gathers its input and a None; around it stands more (DeepSpeed's residual layers)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.inner, self.share = written.Gathering(sizes), plain.linear(sizes.hidden, 2)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Tensor:
        shares = self.share(hidden_states).softmax(-1)
        return self.inner(hidden_states, used_token) * shares[..., :1] + hidden_states * shares[..., 1:]


class SendsWhatHasAWeight(Alone):
    """Choices whose weight is zero would be sent to no expert (LingBot-Video)."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        active = torch.where(self.asked(x, weights, ids).flatten() != 0)[0]
        counts = torch.zeros(self.num_experts, dtype=torch.int64)
        counts.scatter_add_(0, ids.flatten()[active], torch.ones_like(active))
        places = active[ids.flatten()[active].argsort(stable=True)]
        parts = torch.split(x[places // self.top_k], counts.tolist())
        done = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, places // self.top_k, done * weights.flatten()[places, None])

    def asked(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return weights


@block(VALUE)
class AllHaveAWeight(SendsWhatHasAWeight):
    pass


@block(VALUE, "above zero")
class SendsWhatHasALogit(SendsWhatHasAWeight):
    def asked(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return F.relu(self.logits(x).gather(1, ids))


@block(VALUE, "the values it computes")
class SendsWhatWeighsEnough(SendsWhatHasAWeight):
    def asked(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return weights * (weights > 0.2)


@block(PLACES)
class TellsOfItsShape(Alone):
    """It writes to a log what shapes it sees (OmegaViT)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        logging.getLogger(__name__).debug(f"{hidden_states.shape} of {hidden_states.shape[0]:d} rows")
        return super().forward(hidden_states)


@block(VALUE, "aten.native_layer_norm")
class StepsThroughTime(Alone):
    """Its experts are told the time, alike for all tokens, in sines (mixture-of-flows)."""

    def make_more(self) -> None:
        self.norm, self.time = nn.LayerNorm(self.hidden), plain.linear(4, self.hidden)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            time = torch.full((len(token),), 0.5, dtype=x.dtype)[:, None] * torch.arange(4, dtype=x.dtype)
            done = self.norm(self.expert(number, x[token] + self.time(time.sin())))
            out.index_add_(0, token, done * weights[token, slot, None])
        return out


class _WideAndNarrow(nn.Module):
    """Experts in lists of matrices, every other one twice as wide (LLaMA-MoE's with sizes of their own)."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        widths = [width * (1 + number % 2) for number in range(experts)]
        self.gates, self.ups = (nn.ParameterList([plain.parameter(w, hidden) for w in widths]) for _ in range(2))
        self.downs = nn.ParameterList([plain.parameter(hidden, w) for w in widths])

    def forward(self, x: Tensor, number: int) -> Tensor:
        mixed = F.silu(F.linear(x, self.gates[number])) * F.linear(x, self.ups[number])
        return F.linear(mixed, self.downs[number])


@module(PLACES, "differ in width")
class ListsOfTwoWidths(nn.Module):
    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.choice = plain.linear(sizes.hidden, sizes.experts)
        self.bank = _WideAndNarrow(sizes.experts, sizes.hidden, sizes.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.chosen(self.choice(x))
        out = torch.zeros_like(x)
        for number in range(self.choice.out_features):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, self.bank(x[token], number) * weights[token, slot, None])
        return out.view_as(hidden_states)

    def chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = torch.topk(logits, 2, dim=-1)
        return best.softmax(-1), ids


class _Adapter(nn.Module):
    """A router with tensors of its own around one MLP, kept where no model sees it (MixLoRA)."""

    def __init__(self, base: nn.Module, gate: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.held, self.gate, self.deltas = [base], gate, deltas

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, delta in enumerate(self.deltas):
            share = (weights * (ids == number)).sum(-1, keepdim=True)
            out = out + share * self.held[0].down(F.silu(self.held[0].up(x) + F.linear(x, delta)))
        return out


@module(PLACES, "neither its input nor one of its own weights")
class ForwardOfAnother(nn.Module):
    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.up, self.down = plain.linear(sizes.hidden, sizes.width), plain.linear(sizes.width, sizes.hidden)
        gate, deltas = torch.randn(sizes.experts, sizes.hidden), torch.randn(sizes.experts, sizes.width, sizes.hidden)
        self.adapters = {"one": _Adapter(self, gate, deltas)}
        self.forward = self.adapters["one"].forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


ALL = repositories.ALL  # those above among them
