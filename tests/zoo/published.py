"""Blocks of the forms that published model code has, beside those in :mod:`zoo.written`. Near misses have ``words``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import written
from .around import Alone
from .others import PLACES, block

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


ALL = written.ALL  # those above among them
