"""How a block's tokens lie in its input, where that isn't [B, S, H].

They may have places in several dimensions, as those of images, or channels before places, as convolutions have them. A
block that takes nothing else is recorded, asked and replaced as one that takes [B, S, H]: its input is brought into its
form, and its output back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Form:
    """An input [B, *places, H] of so many ``places``, or [B, H, *places] if channels come ``first``."""

    places: int
    first: bool

    def __str__(self) -> str:
        names = {1: "L", 2: "h, w"}.get(self.places, "d, h, w")
        return f"[B, H, {names}]" if self.first else f"[B, {names}, H]"

    @property
    def dimensions(self) -> int:
        """How many an input in this form has."""
        return self.places + 2

    def sides(self, tokens: int) -> tuple[int, ...]:
        """Sizes of places for so many tokens of a row, as near to each other as can be."""
        left, found = tokens, []
        for number in range(self.places, 1, -1):
            side = next(size for size in range(max(int(left ** (1 / number) + 1e-9), 1), 0, -1) if left % size == 0)
            found.append(side)
            left //= side
        return *found, left

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of an input in this form, of tokens [B, S, H] of that ``shape``."""
        lead = (shape[0] if len(shape) > 2 else 1, *self.sides(shape[-2]))
        return (lead[0], shape[-1], *lead[1:]) if self.first else (*lead, shape[-1])

    def given(self, x: Tensor) -> Tensor:
        """Tokens [B, S, H], or [T, H] as those of one row, in this form; contiguous where they are."""
        x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x[None]
        made = self._placed(x, (len(x), *self.sides(x.shape[1])))
        return made.contiguous() if x.is_contiguous() else made

    def back(self, x: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Tokens [B, S, H] in this form, of the sizes ``lead``: those of the batch and of its places."""
        return self._placed(x, lead).contiguous()

    def _placed(self, x: Tensor, lead: tuple[int, ...]) -> Tensor:
        x = x.reshape(*lead, x.shape[-1])
        return x.movedim(-1, 1) if self.first else x

    def lead(self, x: Tensor) -> tuple[int, ...]:
        """The sizes of the batch and of the places of an input in this form."""
        return (x.shape[0], *x.shape[2:]) if self.first else tuple(x.shape[:-1])

    def tokens(self, x: Tensor) -> Tensor:
        """An input or output in this form as tokens [B, S, H]."""
        x = x.movedim(1, -1) if self.first else x
        return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


IMAGES, PLANES = Form(2, False), Form(2, True)
FORMS = (Form(1, True), IMAGES, PLANES, Form(3, False), Form(3, True))
"""Those that are tried, likeliest first."""
