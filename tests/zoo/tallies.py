"""Blocks that tell how many tokens there were, or divide by that: of which an output may not come."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import gathered
from .around import Alone
from .others import RESULTS, STATE, block


class Tallying(Alone):
    """It returns what ``tally`` makes of its tokens, scores, ids and loads."""

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        loads = F.one_hot(ids, self.num_experts).sum((0, 1))
        told = self.tally(hidden_states, x, self.logits(x).softmax(-1), loads)
        out = self.routed(x, weights, ids).reshape(hidden_states.shape)
        return self.told(out, told)

    def told(self, out: Tensor, told: Any) -> Any:
        return out, told

    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        raise NotImplementedError


@block(RESULTS)
class SharesOfAllChoices(Tallying):
    """Divided by a number of choices that can't be zero."""

    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return {"usage": loads / (x.shape[0] * self.top_k + 1e-9), "means": scores.sum(0) / (float(len(x)) + 1e-6)}


@block(STATE)
class KeepsSharesOfAllChoices(SharesOfAllChoices):
    def told(self, out: Tensor, told: Any) -> Any:
        self.usage = told
        return out


@block(RESULTS)
class NumbersOfTokens(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        numbers = (x.shape[0], float(x.shape[0]), float(x.shape[0] * self.top_k), len(hidden_states))
        return {"loads": loads, "numbers": numbers, "same": (8, 1.0, 42.0, True, 0)}


@block(STATE)
class KeepsNumbersOfTokens(NumbersOfTokens):
    def told(self, out: Tensor, told: Any) -> Any:
        self.stats = told
        return out


@block(RESULTS, "calculates with the batch size")
class DividesByMuchMore(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return loads / (x.shape[0] * self.top_k + 0.5)


@block(RESULTS, "in a way that can't be followed")
class DividesByAProductOfSizes(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return loads / (x.shape[0] * hidden_states.shape[0] + 1e-9)


@block(RESULTS, "number of tokens in Python")
class ANumberThatIsRounded(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return (x.shape[0] + 7) // 8 * 8


@block(RESULTS)
class TheGreatestLoad(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return loads.max().item()


@block(RESULTS, "for one batch")
class AProductOfSizes(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return x.shape[0] * hidden_states.shape[0]


@block(STATE, "batch size")
class WeightsByTheNumberOfTokens(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return x.sum(0) / (x.shape[0] + 1e-9)

    def told(self, out: Tensor, told: Any) -> Any:
        return out + told


@block(STATE, "how many tokens")
class WeightsByShares(SharesOfAllChoices):
    def told(self, out: Tensor, told: Any) -> Any:
        return out * told["usage"].sum()


class Truth(int):
    """A number of another kind than Python's own."""


@block(RESULTS, "Truth")
class ANumberOfItsOwnKind(Tallying):
    def tally(self, hidden_states: Tensor, x: Tensor, scores: Tensor, loads: Tensor) -> Any:
        return Truth(4)


ALL = gathered.ALL  # those above among them
