"""Programs tried with made-up weights: whether they look at one token at a time, and whether two do the same.

A program is made of a record, and a record is of one batch. So a branch that looks at sizes, memory or a token's place
in a way that can't be seen shows where programs are run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_surgery.replay import Program

_TRIED = (3, 4)
_PLACES = (0, 6)  # no mirror images of each other
_MOVED = (6, 1)
_LOUDER = 8


@dataclass(eq=False)
class Trial:
    """Weights made up for a block whose own are of these ``shapes``, and inputs of size ``hidden`` in ``dtype``.

    What its routed experts came to is of size ``inner``.
    """

    shapes: Mapping[str, Tensor]
    hidden: int
    inner: int
    dtype: torch.dtype
    _made: dict[str, Tensor] = field(default_factory=dict)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu").manual_seed(0))

    def row_by_row(self, program: Program) -> bool:
        """Whether what a program makes of one token depends on neither the others nor the token's place."""
        return self._row_by_row(program, _louder) and (not program.companions or self._row_by_row(program, _negative))

    def _row_by_row(self, program: Program, unlike: Callable[[Tensor], Tensor]) -> bool:
        (x, routed), (other, others) = self._inputs(_TRIED), map(unlike, self._inputs(_TRIED))
        for mine, its in ((x, other), (routed, others)):
            its.view(-1, its.shape[-1])[list(_MOVED)] = mine.view(-1, mine.shape[-1])[list(_PLACES)]
        first, second = self._run(program, x, routed), self._run(program, other, others)
        found = [(first, _PLACES), (second, _MOVED)]
        one, two = ([answer.reshape(12, -1)[list(places)] for answer in answers] for answers, places in found)
        return _same(one, two)

    def alike(self, program: Program, other: Program, shape: tuple[int, ...]) -> bool:
        """Whether two programs make the same of tokens [B, S, H], or [T, H], of a ``shape``."""
        x, routed = self._inputs(shape[:-1])
        flat = [answer.flatten() for answer in self._run(program, x, routed)]
        return _same(flat, [answer.flatten() for answer in self._run(other, x, routed)])

    def _inputs(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        x, routed = (torch.randn(*lead, size, generator=self._generator) for size in (self.hidden, self.inner))
        return x.to(self.dtype), routed.to(self.dtype)

    def _run(self, program: Program, x: Tensor, routed: Tensor) -> list[Tensor]:
        """What a program makes of ``x``; nothing if loads of the batch that it was recorded with are in it."""
        for name in program.weights:
            if name not in self._made:
                held = self.shapes[name]
                made = torch.randn(held.shape, generator=self._generator, dtype=torch.float32) / self.hidden**0.5
                self._made[name] = (made if held.is_floating_point() else made > 0).to(held.dtype)
        try:
            begun = program.begin(x, self._made)
            whole = [begun.finished(routed)] if program.whole is not None else []
        except (RuntimeError, IndexError):
            return []
        return [*begun.outputs.values(), *whole]


def _louder(others: Tensor) -> Tensor:
    """Other tokens than in the first batch: what looks at the largest of a batch would else see much the same."""
    return others * _LOUDER


def _negative(others: Tensor) -> Tensor:
    """Other tokens of which the same bits are made up beside the input."""
    return -others.abs() * _LOUDER


def _same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) > 0 and all(
        mine.shape == its.shape and torch.allclose(mine.double(), its.double(), rtol=1e-2, atol=1e-4, equal_nan=True)
        for mine, its in zip(one, two, strict=True)
    )
