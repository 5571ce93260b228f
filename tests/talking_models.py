"""Models that look at their blocks: small ones, whose layers do more with a block than to call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 16, 6, 2
IDS = torch.arange(14).view(2, 7)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.u = (nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        self.d = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.silu(self.g(x)) * self.u(x))


@dataclasses.dataclass
class Config:
    k: int = TOP_K


class Block(nn.Module):
    """A softmax top-2 block with a list of experts, and things that others may ask it for."""

    factor = 3

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.num_experts, self.config, self.aux_loss = EXPERTS, Config(), 0.0

    @property
    def top_k(self) -> int:
        return self.config.k

    def doubled(self) -> int:
        return 2 * self.num_experts

    def forward(self, x: Tensor) -> Tensor:
        t = x.reshape(-1, HIDDEN)
        w, i = torch.topk(self.gate(t).softmax(-1), self.config.k, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(i == e)
            out.index_add_(0, rows, expert(t[rows]) * w[rows, slot, None])
        return out.reshape(x.shape)


Step = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """``x + step(self, norm(x))``; ``keep`` gives it more to hold of its block."""

    def __init__(self, block: nn.Module, step: Step, keep: Callable[[Layer, Any], None] | None = None) -> None:
        super().__init__()
        self.norm, self.mlp, self.step = nn.LayerNorm(HIDDEN), block, step
        if keep is not None:
            keep(self, block)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step(self, self.norm(x))


def plain(layer: Layer, x: Tensor) -> Tensor:
    return layer.mlp(x)


def model(
    step: Step = plain, keep: Callable[[Layer, Any], None] | None = None, layers: int = 2, seed: int = 0
) -> nn.Sequential:
    """Embeddings and ``layers`` layers, of which all but the first take the ``step``."""
    made = [Layer(Block(), plain), *(Layer(Block(), step, keep) for _ in range(layers - 1))]
    found = nn.Sequential(nn.Embedding(40, HIDDEN), *made).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if ".norm." not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.3 / p.shape[-1] ** 0.5)
    return found
