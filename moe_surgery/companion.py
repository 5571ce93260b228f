"""A tensor that a block takes beside its input: which form it has, and one made up where there is no model to give it.

What is made up comes of the input row by row, so that tokens can be put together in any order and take it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS = 12


@dataclass(frozen=True)
class Companion:
    """The form of an argument called ``name`` beside the input [..., H].

    ``over`` is "tokens" for one number of each token [...], "features" for another [..., H], or a shape that is the
    same in every call. ``dtype`` is None for the input's; whole numbers are made up below ``below``. Tensors of the
    dtypes ``also`` are treated alike.
    """

    name: str
    over: Literal["tokens", "features"] | tuple[int, ...]
    dtype: torch.dtype | None = None
    below: int = 2
    also: tuple[torch.dtype | None, ...] = ()

    @property
    def key(self) -> str:
        """What it is called among a call's tensors."""
        return f"beside {self.name}"

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape beside an input whose shape is ``of``."""
        if isinstance(self.over, tuple):
            return self.over
        return tuple(of) if self.over == "features" else tuple(of[:-1])

    def fits(self, value: object, x: Tensor) -> bool:
        """Whether a ``value`` that was given beside ``x`` has this form."""
        # A report has specs, and needs no torch.
        from torch import Tensor

        return (
            isinstance(value, Tensor)
            and tuple(value.shape) == self.shape(tuple(x.shape))
            and value.dtype in [x.dtype if dtype is None else dtype for dtype in (self.dtype, *self.also)]
            and value.device == x.device
        )

    def made(self, x: Tensor) -> Tensor:
        """One for ``x``, the same in every dtype of it."""
        import torch

        if isinstance(self.over, tuple):
            generator = torch.Generator("cpu").manual_seed(len(self.name))
            numbers = torch.randn(self.over, generator=generator, dtype=torch.float32, device="cpu")
            return numbers.bfloat16().to(x.dtype).to(x.device)  # no other dtype rounds it further
        if self.over == "features":
            return x.roll(1, -1)
        if self.dtype is None:
            return x[..., 0] * (x[..., 0] > 0)
        signs = (x[..., :_BITS] > 0).long()
        numbers = (signs << torch.arange(signs.shape[-1], device=x.device)).sum(-1)
        return (numbers % self.below).to(self.dtype)


def made_up(companions: tuple[Companion, ...], x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is ``given`` beside ``x``, and the rest made up."""
    return {c.key: given[c.key] if c.key in given else c.made(x) for c in companions}
