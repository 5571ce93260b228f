"""Blocks of the forms that published code and training repositories have beside those in :mod:`zoo.others`.

Near misses have ``words``, as there.
"""

from __future__ import annotations

from typing import Any

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


class Dispatched(Alone):
    """Tokens in the order of their experts, found by a mask, in a shape that is kept for the way back (Megatron)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.hidden_shape = self.kept_shape(hidden_states)
        x = hidden_states.view(-1, self.hidden)
        weights, ids = self.route(x)
        dense = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, ids, weights).t()
        sent = torch.zeros(len(x), self.num_experts, dtype=torch.bool).scatter(1, ids, True).t().contiguous()
        rows = torch.arange(len(x)).expand(self.num_experts, -1).masked_select(sent)
        parts = x.index_select(0, rows).split(sent.sum(1).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        done = done * dense.contiguous().masked_select(sent)[:, None]
        out = torch.zeros_like(x).index_add_(0, rows, done)
        return out.view(self.hidden_shape)

    def kept_shape(self, hidden_states: Tensor) -> Any:
        return hidden_states.shape


@block(STATE)
class KeepsItsInputsShape(Dispatched):
    pass


@block(STATE, "keeps state")
class KeepsTheFirstInputsShape(Dispatched):
    hidden_shape = None

    def kept_shape(self, hidden_states: Tensor) -> Any:
        known = self.hidden_shape
        return hidden_states.shape if known is None or known.numel() != hidden_states.numel() else known


@block(STATE, "keeps state")
class DoublesAfterTheFirst(Dispatched):
    """It asks whether it was called before, and looks at nothing."""

    hidden_shape = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = 1.0 if self.hidden_shape is None else 2.0
        return super().forward(hidden_states) * factor


ALL = around.ALL  # those above among them
