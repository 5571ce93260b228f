"""Whether a block still does what it did: inputs of many sizes, and outputs or errors to hold against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.read.reading import Reading
from moe_surgery.targets.reference import forward
from moe_surgery.weights.tensors import gather

TOLERANCE = 64
"""How many units of the dtype's precision two sums of a few dozen products may differ by, relative to the largest."""

SHAPES = ((1, 1), (2, 3), (1, 64), (5, 13), (1, 200))
FEW = ((1, 1), (5, 13))


class Holder(nn.Module):
    """A model of one layer, so that its block has a place to be replaced in. Adds the block's output to its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def inputs(
    hidden: int = 32, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, int]] = SHAPES
) -> Iterator[Tensor]:
    """Batches from one token to two hundred; one of many copies of a token, which all go to the same experts."""
    generator = torch.Generator().manual_seed(1)
    for shape in shapes:
        yield torch.randn(*shape, hidden, generator=generator).to(dtype)
    yield torch.randn(1, 1, hidden, generator=generator).expand(2, 100, -1).to(dtype).contiguous()


def outputs(block: Callable[[Tensor], Any], hidden: int = 32, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Any]:
    """What a block answers to :func:`inputs`: a tensor, or the class of the error it raises."""
    answers: list[Any] = []
    for x in inputs(hidden, shapes=shapes):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                answers.append(block(x.clone()))
        except Exception as error:
            answers.append(type(error))
    return answers


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value, in units of the first one's precision."""
    difference = (one.double() - other.double()).abs().max() / other.double().abs().max()
    return float(difference) / torch.finfo(one.dtype).eps


def assert_reads_right(block: nn.Module, reading: Reading, hidden: int = 32) -> None:
    """The reference, computed in float64 from what was read alone, is what the block computes."""
    tensors = gather(block, reading.layout)
    dtype = tensors.w13.dtype
    for x in inputs(hidden, dtype):
        with torch.no_grad():
            try:
                mine = block(x.clone())
            except RuntimeError:  # it takes tokens only
                mine = block(x.reshape(-1, hidden)).reshape(x.shape)
        truth = forward(reading.spec, tensors, x.reshape(-1, hidden), torch.float64).reshape(x.shape)
        assert distance(mine, truth) < TOLERANCE, f"{tuple(x.shape)}: {distance(mine, truth):.3g} units apart"
