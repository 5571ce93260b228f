"""Blocks with weights for tokens that they are told of, such as those of images, and text alone (Ming, ERNIE-VL)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import in_python, plain
from . import operators as operators  # which add to them
from . import slots as slots
from .around import Alone
from .others import ARGUMENTS, block

__all__ = ["ALL"]


class _ToldOfImages(Alone):
    def forward(self, hidden_states: Tensor, image_mask: Tensor | None = None) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        out = self.routed(x, *self.route(x))
        if image_mask is not None:
            out = torch.where(image_mask.reshape(-1, 1), self.of_images(x), out)
        return out.view(hidden_states.shape)

    def of_images(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@block(ARGUMENTS)
class AnotherRouterForImages(_ToldOfImages):
    def make_more(self) -> None:
        self.image_gate = plain.linear(self.hidden, self.num_experts)

    def of_images(self, x: Tensor) -> Tensor:
        weights, ids = self.image_gate(x).softmax(-1).topk(self.top_k, -1)
        return self.routed(x, weights, ids)


@block(ARGUMENTS)
class OtherExpertsForImages(_ToldOfImages):
    def make_more(self) -> None:
        self.image_experts = nn.ModuleList(plain.MLP(self.hidden, 8) for _ in range(2))

    def of_images(self, x: Tensor) -> Tensor:
        return sum(expert(x) for expert in self.image_experts)  # type: ignore[return-value]


@block(ARGUMENTS, "image_gate.weight takes no part")
class AnotherRouterForNothing(Alone):
    def make_more(self) -> None:
        self.image_gate = plain.linear(self.hidden, self.num_experts)


ALL = in_python.ALL  # those above among them
