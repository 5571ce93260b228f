"""What the kernels compute and over which tensors: the spec's numbers, and the folded weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE_ROWS = 256
"""Up to this many tokens, an expert's output is kept in float32 until it is added to the others'."""


@dataclass(frozen=True)
class Terms:
    """One block in numbers. ``slices`` experts of the routed width stand for the shared expert, 0 if there is none.

    ``native`` logits are rounded to the input's dtype before experts are ranked, as the spec's routers do. Experts are
    ranked ``by_sigmoid``, which saturates, where the block ranks its sigmoid scores, else by logits.
    """

    experts: int
    top_k: int
    slices: int
    hidden: int
    width: int
    activation: str
    sigmoid: bool
    renormalize: bool
    scale: float
    shared_scale: float
    gated: bool
    native: bool
    by_sigmoid: bool

    @property
    def pairs(self) -> int:
        """Experts that each token visits, the shared expert's slices included."""
        return self.top_k + self.slices

    @property
    def rows(self) -> int:
        """Rows of the router's weight: one for each expert, one for the shared expert's gate if it has one."""
        return self.experts + (1 if self.gated else 0)

    def rows_dtype(self, tokens: int, dtype: torch.dtype) -> torch.dtype:
        """What experts' outputs are kept in: float32 where that costs next to nothing, else the block's dtype."""
        return torch.float32 if tokens <= WIDE_ROWS else dtype


@dataclass(frozen=True, eq=False)
class Weights:
    """Folded weights, all contiguous, of one dtype on one device.

    ``router`` [E or E+1, H], the shared expert's gate last; ``w13`` [E, 2I, H] and ``w2`` [E, H, I] of the routed
    experts; ``shared13`` [M, 2I, H] and ``shared2`` [M, H, I] of the shared expert's slices, or None.
    """

    router: Tensor
    w13: Tensor
    w2: Tensor
    shared13: Tensor | None
    shared2: Tensor | None

    def offsets(self) -> tuple[int, int]:
        """Where the shared slices begin, in elements from the first routed expert: of ``w13`` and of ``w2``."""
        if self.shared13 is None or self.shared2 is None:
            return 0, 0
        size = self.w13.element_size()
        return (
            (self.shared13.data_ptr() - self.w13.data_ptr()) // size,
            (self.shared2.data_ptr() - self.w2.data_ptr()) // size,
        )
