"""Blocks of the forms that published code and training repositories have beside those in :mod:`zoo.others`.

Near misses have ``words``, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import around, plain
from .around import Alone
from .others import STATE, block

__all__ = ["ALL"]


@block(STATE, "nor one of its own weights")
class ConvertsItsRouter(Alone):
    """Its router's matrix becomes another parameter when it is called first (nllb-moe)."""

    def logits(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(torch.bfloat16)
        return self.gate(x.bfloat16()).float()


@block(STATE, "keeps state")
class MakesABufferOnTheWay(Alone):
    def logits(self, x: Tensor) -> Tensor:
        if "shift" not in self._buffers:
            self.register_buffer("shift", torch.zeros(plain.SIZES.experts))
        return super().logits(x) + self.shift


ALL = around.ALL  # those above among them
