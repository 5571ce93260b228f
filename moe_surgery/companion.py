"""A tensor that a block takes beside its input: which form it has, and one made up where there is no model to give it.

What is made up comes of the input row by row, so that tokens can be put together in any order and take it along. A mask
that is made up hangs on the last bit of a token's first number, so that any token has a twin which is masked otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS = 12
_DIGITS = 2**8  # of bfloat16, which has the fewest


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
    def masks(self) -> bool:
        """Whether it is one number of each token, which may be zero."""
        return self.over == "tokens" and (self.dtype is None or self.below == 2)

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
            return x[..., 0].abs() * _told(x[..., 0])
        if self.below == 2:
            return _told(x[..., 0]).to(self.dtype)
        signs = (x[..., :_BITS] > 0).long()
        numbers = (signs << torch.arange(signs.shape[-1], device=x.device)).sum(-1)
        return (numbers % self.below).to(self.dtype)


def twins(x: Tensor) -> Tensor:
    """Tokens [N, H] that are masked where those in ``x`` are not, and else as near to them as can be; zeros stay."""
    import torch

    first = x[:, 0]
    mantissa, exponent = torch.frexp(first.float())
    whole = (mantissa.abs() * _DIGITS).floor()
    other = torch.ldexp(torch.where(whole % 2 == 0, whole + 1, whole - 1) / _DIGITS, exponent).copysign(first.float())
    return torch.cat([torch.where(first == 0, first, other.to(x.dtype))[:, None], x[:, 1:]], 1)


def _told(numbers: Tensor) -> Tensor:
    """Whether the last of the bits that numbers of any dtype have is set."""
    import torch

    return (torch.frexp(numbers.float()).mantissa.abs() * _DIGITS).floor() % 2 == 1


def made_up(companions: tuple[Companion, ...], x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is ``given`` beside ``x``, and the rest made up."""
    return {c.key: given[c.key] if c.key in given else c.made(x) for c in companions}
