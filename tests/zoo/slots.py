"""Blocks that fill slots of each expert with tokens, in ways that no token can tell of alone, and call all experts.

Their experts alone can be replaced. Near misses have ``words``, as in :mod:`zoo.others`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import plain
from .others import module

SLOTS = "slots"
HIDDEN, COUNT, WIDTH = 32, 4, 24


class Bank(nn.Module):
    """Experts of slots [E, C, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = plain.parameter(COUNT, HIDDEN, WIDTH)
        self.w2 = plain.parameter(COUNT, WIDTH, HIDDEN)

    def forward(self, slots: Tensor) -> Tensor:
        return torch.bmm(F.relu(torch.bmm(slots, self.w1)), self.w2)


class ListedBank(nn.Module):
    """Experts of slots [G, E, C, H], one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(plain.MLP(HIDDEN, WIDTH, F.silu) for _ in range(COUNT))

    def forward(self, slots: Tensor, group: Any = None) -> Tensor:
        parts = slots.chunk(COUNT, dim=1)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=1)


class Capacity(nn.Module):
    """An expert takes so many tokens as it has slots, the first ones; all others are nothing."""

    bank: type[nn.Module] = Bank
    grouped = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = plain.linear(HIDDEN, COUNT)
        self.experts = self.bank()

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, HIDDEN)
        dispatch, combine = self.tables(x)
        slots = torch.einsum("tec,th->ech", dispatch.to(x.dtype), x)
        out = self.experts(slots[None])[0] if self.grouped else self.experts(slots)
        return torch.einsum("tec,ech->th", combine.to(x.dtype), out).view(hidden_states.shape)

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which token is in which slot [T, E, C], and with which weight."""
        scores = self.gate(x).softmax(-1)
        best, ids = scores.max(-1)
        slots = max(1, len(x) // COUNT)
        told = F.one_hot(ids, COUNT)
        places = (told.cumsum(0) - 1) * told
        kept = told * (places < slots)
        dispatch = kept[..., None] * F.one_hot(places.clamp(max=slots - 1), slots)
        return dispatch, dispatch * best[:, None, None]


@module(SLOTS, at="experts")
class DropsTokens(Capacity):
    """As GShard's blocks, with experts of one stacked tensor for each projection."""


@module(SLOTS, at="experts")
class DropsTokensInGroups(Capacity):
    """As DeepSpeed's, with a list of experts and a dimension for the ranks of a group."""

    bank = ListedBank
    grouped = True


@module(SLOTS, at="experts")
class ExpertsChoose(Capacity):
    """Every expert takes the tokens that have most weight for it."""

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        best = scores.t().topk(max(1, len(x) // 2), dim=-1)
        dispatch = F.one_hot(best.indices, len(x)).permute(2, 0, 1)
        return dispatch, dispatch * best.values[None]


@module(SLOTS, at="experts")
class MixesTokens(Capacity):
    """Every slot holds a mean of all tokens, as in soft mixtures."""

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)[..., None] * torch.arange(1, 3)
        return logits.softmax(0), logits.flatten(1).softmax(-1).view(logits.shape)


class FlippedBank(Bank):
    """Slots are counted from the last expert."""

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots.flip(0)).flip(0)


class FarBank(ListedBank):
    """Slots [C, E, H]."""

    def forward(self, slots: Tensor, group: Any = None) -> Tensor:
        return torch.stack([expert(slots[:, e]) for e, expert in enumerate(self.experts)], dim=1)


@module(SLOTS, at="experts")
class NumbersBackwards(Capacity):
    bank = FlippedBank


@module(SLOTS, at="experts")
class SlotsFirst(Capacity):
    bank = FarBank

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, HIDDEN)
        dispatch, combine = self.tables(x)
        out = self.experts(torch.einsum("tec,th->ceh", dispatch.to(x.dtype), x))
        return torch.einsum("tec,ceh->th", combine.to(x.dtype), out).view(hidden_states.shape)


class CentringBank(Bank):
    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots - slots.mean(1, keepdim=True))


class CrowdedBank(Bank):
    """Otherwise where there are many slots."""

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots if slots.shape[1] < 4 else 2 * slots)


class NeighbouringBank(Bank):
    """What an expert makes is added to the next one's."""

    def forward(self, slots: Tensor) -> Tensor:
        out = super().forward(slots)
        return out + torch.cat([out[-1:], out[:-1]])


class KeepingBank(Bank):
    def forward(self, slots: Tensor) -> Tensor:
        self.last = super().forward(slots)
        return self.last


class CountingBank(Bank):
    def forward(self, slots: Tensor) -> Tensor:
        self.slots = slots.shape[1]
        return super().forward(slots)


class AddingBank(Bank):
    """With an output bias for all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = plain.parameter(1, HIDDEN)

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots) + self.bias


class EmptyingBank(Bank):
    """Slots that are zero stay zero, as those of the experts do that have no biases; but others too."""

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots) * (slots.abs().sum(-1, keepdim=True) > 1e-3)


class ScaledBank(Bank):
    factor = 1.0

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots * self.factor)


@module(SLOTS, "the forward of mlp writes to factor, which its code reads", at="experts")
class SetsWhatItsExpertsRead(Capacity):
    bank = ScaledBank

    def forward(self, hidden_states: Tensor) -> Any:
        self.experts.factor = float(hidden_states.shape[1])
        return super().forward(hidden_states)


for _bank, _words in (
    (CentringBank, "nor its experts alone (experts): a routed expert's input is"),
    (CrowdedBank, "nor its experts alone (experts): what it does depends on the batch size"),
    (NeighbouringBank, "nor its experts alone (experts): a routed expert's input is x, not"),
    (KeepingBank, "nor its experts alone (experts): its experts write to last"),
    (CountingBank, "nor its experts alone (experts): its experts write to slots"),
    (AddingBank, "nor its experts alone (experts): bias[0] is used in two places"),
    (EmptyingBank, "nor its experts alone (experts): what it does depends on the values"),
):
    module(SLOTS, _words)(type(f"Behind{_bank.__name__}", (Capacity,), {"bank": _bank}))


@module(SLOTS, "nor its experts alone (experts, others): there are 2 such modules, and no more than one is replaced")
class TwoBanks(Capacity):
    """What one bank makes of its slots goes on to another."""

    def __init__(self) -> None:
        super().__init__()
        self.others = self.bank()

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, HIDDEN)
        dispatch, combine = self.tables(x)
        out = self.others(self.experts(torch.einsum("tec,th->ech", dispatch.to(x.dtype), x)))
        return torch.einsum("tec,ech->th", combine.to(x.dtype), out).view(hidden_states.shape)
