"""What a layer does with a block and the shared expert beside it is followed exactly, or not taken for a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_surgery.read.beside import beside
from moe_surgery.read.reading import Unreadable


class Layer(nn.Module):
    """What the layers below have in common; a norm may take a residual and then returns both."""

    scale, calls = 0.5, 0

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.moe, self.shared = (nn.Linear(4, 4) for _ in range(4))


class Copied(Layer):
    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        h = x + self.attention(positions, x) * self.scale
        normed = self.norm(h)
        out = self.moe(normed.clone())
        return h + (out + self.shared(normed)) * self.scale


class Residual(Layer):
    def forward(self, x: Tensor, residual: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, x = x, self.norm(x)
        else:
            x, residual = self.norm(x, residual)
        x = self.attention(x, **more)
        shared = self.shared(x)
        out = self.moe(x)
        out += shared
        return out, residual


class Plain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class OfItsInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.moe(x)


class Subtracted(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) - self.shared(x)


class OtherInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.norm(x)) + self.shared(x)


class Normed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.moe(x)) + self.shared(x)


class Doubled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        return self.moe(x) + shared + shared


class CalledTwice(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) + self.shared(x) + self.shared(x + 1)


class BlockTwice(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.moe(x)) + self.shared(x)


class Written(Layer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.moe(x)
        x.mul_(2)
        return out + self.shared(x)


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) + self.shared(x) if x.shape[0] < 8 else self.moe(x)


class ByArgument(Layer):
    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.moe(x) if residual is None else self.moe(x) + self.shared(x)


class ByKeyword(Layer):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.moe(x) if more.get("routed") else self.moe(x) + self.shared(x)


class Counting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.moe(x) + self.shared(x) if self.calls < 9 else self.moe(x)


@pytest.mark.parametrize("kind", [Copied, Residual])
def test_a_sum_of_two_answers_to_one_tensor(kind: type[Layer]) -> None:
    assert beside(kind(), "moe") == "shared"


@pytest.mark.parametrize("kind", [Plain, OfItsInput, Subtracted])
def test_no_sum_with_another_module(kind: type[Layer]) -> None:
    assert beside(kind(), "moe") is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherInput, "what comes of shared, which is not one answer to the same tensor"),
        (Normed, "what comes of shared, which is not one answer to the same tensor"),
        (Doubled, "uses shared, which it adds to it, more than once"),
        (CalledTwice, "uses shared, which it adds to it, more than once"),
        (BlockTwice, "calls moe 2 times"),
        (Written, "does something else between its calls of moe and shared"),
        (Branching, "can't be followed: TraceError"),
        (ByArgument, "depending on its arguments"),
        (ByKeyword, "looks at its arguments \\*more"),
        (Counting, "keeps state between calls"),
    ],
)
def test_anything_else_is_said(kind: type[Layer], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        beside(kind(), "moe")


def test_a_patched_layer_is_not_followed() -> None:
    layer = Copied()
    layer.forward = lambda positions, x: layer.moe(x)  # type: ignore[method-assign]
    with pytest.raises(Unreadable, match="a forward of its own"):
        beside(layer, "moe")


def test_nothing_is_left_behind() -> None:
    layer, x = Residual(), torch.randn(3, 4)
    call = nn.Module.__call__
    expected = layer.shared(layer.attention(layer.norm(x))) + layer.moe(layer.attention(layer.norm(x)))
    beside(layer, "moe")
    assert nn.Module.__call__ is call
    torch.testing.assert_close(layer(x)[0], expected)
