"""Blocks of convolutions over one place, which are linear layers of tokens. Near misses have ``words``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import plain, tallies
from .others import PLACES, module


class _Pointwise(nn.Module):
    """An MLP of convolutions of tokens [N, C, T]."""

    def __init__(self, hidden: int, width: int, **how: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(hidden, width, **{"kernel_size": 1, **how}), nn.Conv1d(width, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class _Gated(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(hidden, 2 * width, 1), nn.Conv2d(width, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x[..., None]).chunk(2, 1)
        return self.down(F.silu(gate) * up)[..., 0]


class _Turning(nn.Module):
    """Each expert is given its tokens as one row of places, [1, C, N] (a port of a speech model's)."""

    def __init__(self, sizes: plain.Sizes = plain.SIZES) -> None:
        super().__init__()
        self.score = nn.Conv1d(sizes.hidden, sizes.experts, 1)
        self.bank = nn.ModuleDict({f"e{n}": self.made(sizes.hidden, sizes.width) for n in range(sizes.experts)})

    def made(self, hidden: int, width: int) -> nn.Module:
        return _Pointwise(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.score(hidden_states.transpose(-1, -2)).transpose(-1, -2)
        weights, ids = logits.reshape(len(x), -1).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number in range(len(self.bank)):
            rows, slots = torch.where(ids == number)
            if rows.numel() == 0:  # a convolution takes no fewer places than one
                continue
            done = self.bank[f"e{number}"](x[rows].t()[None])[0].t()
            out.index_add_(0, rows, done * weights[rows, slots, None])
        return out.view(hidden_states.shape)


@module(PLACES)
class OfConvolutionsOverOnePlace(_Turning):
    pass


@module(PLACES)
class OfGatedConvolutionsOfImages(_Turning):
    def made(self, hidden: int, width: int) -> nn.Module:
        return _Gated(hidden, width)


@module(PLACES, "convolves over several places")
class OfConvolutionsOverThreePlaces(_Turning):
    def made(self, hidden: int, width: int) -> nn.Module:
        return _Pointwise(hidden, width, kernel_size=3, padding=1)


@module(PLACES, "convolves over several places")
class OfConvolutionsOfGroups(_Turning):
    def made(self, hidden: int, width: int) -> nn.Module:
        return _Pointwise(hidden, width, groups=2)


@module(PLACES, "no meaning for", "single rows")
class OfScaledConvolutions(_Turning):
    class _Scaled(_Pointwise):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(F.conv1d(x, self.up.weight * 2, self.up.bias), approximate="tanh"))

    def made(self, hidden: int, width: int) -> nn.Module:
        return self._Scaled(hidden, width)


ALL = tallies.ALL  # those above among them
