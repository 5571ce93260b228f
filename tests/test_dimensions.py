"""Inputs of another number of dimensions than a block was read with: the same or an error, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import plain
from zoo.around import Alone
from zoo.others import LISTED
from zoo.plain import Base, block_class
from zoo.same import distance

import moe_surgery
from moe_surgery.calling import UnreadCall
from moe_surgery.targets.base import SwappedBlock

IMAGES = (2, 3, 4)


class Plain(Alone):
    def forward(self, hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states)
        return out * 2 if self.many(hidden_states) else out

    def many(self, x: Tensor) -> bool:
        return False


class ByMatch(Plain):
    def many(self, x: Tensor) -> bool:
        match x.shape:
            case (_, _, _, _):
                return True
        return False


class ByStar(Plain):
    def many(self, x: Tensor) -> bool:
        _, *lead, _ = x.shape
        return bool(lead[1:])


class ByTuple(Plain):
    def many(self, x: Tensor) -> bool:
        sizes = tuple(x.shape)
        return len(sizes) > 3


class ByError(Plain):
    def many(self, x: Tensor) -> bool:
        try:
            _, _, _, _ = x.shape
        except ValueError:
            return False
        return True


class WithLogits(Plain):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states.reshape(-1, self.hidden))


class WithBatchedLogits(Plain):
    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), self.logits(hidden_states)


class WithALossOfRows(Plain):
    def forward(self, hidden_states: Tensor) -> Any:
        scores = self.logits(hidden_states).softmax(-1)
        return super().forward(hidden_states), scores.mean(1).square().sum()


class KeepsItsRows(Plain):
    def forward(self, hidden_states: Tensor) -> Any:
        batch, *_ = hidden_states.shape
        self.rows = batch
        return super().forward(hidden_states)


def swapped(kind: type[Base]) -> tuple[nn.Module, nn.Module]:
    """A block as it was, and what takes its place."""
    whole = block_class(kind, *LISTED, name=kind.__name__)
    old, model = plain.make(whole), nn.Sequential(plain.make(whole)).eval()
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced" and isinstance(model[0], SwappedBlock), step.reason
    return old.eval(), model[0]


def first(answer: Any) -> Tensor:
    found: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return found


@pytest.mark.parametrize("kind", [Plain, WithLogits, KeepsItsRows])
def test_images_that_are_known_to_be_taken_for_tokens_are(kind: type[Base]) -> None:
    old, new = swapped(kind)
    x = torch.randn(*IMAGES, 32)
    with torch.no_grad():
        before, after = old(x), new(x)
    assert first(after).shape == first(before).shape and distance(first(after), first(before)) < 64
    if isinstance(before, tuple):
        assert after[1].shape == before[1].shape and distance(after[1], before[1]) < 64
    if kind is KeepsItsRows:
        assert new.rows == old.rows == IMAGES[0]


@pytest.mark.parametrize("kind", [ByMatch, ByStar, ByTuple, ByError, WithBatchedLogits, WithALossOfRows])
def test_images_that_may_be_something_else_are_an_error(kind: type[Base]) -> None:
    old, new = swapped(kind)
    x = torch.randn(*IMAGES, 32)
    with torch.no_grad():
        old(x)
        with pytest.raises(UnreadCall, match="of 4 dimensions"):
            new(x)
        for tokens in (x[0], x[0, 0]):
            assert distance(first(new(tokens)), first(old(tokens))) < 64


@pytest.mark.parametrize("lead", [(), (1, 2, 1, 2)], ids=str)
def test_other_dimensions_are_an_error(lead: tuple[int, ...]) -> None:
    old, new = swapped(Plain)
    with torch.no_grad():
        old(torch.randn(*lead, 32))
        with pytest.raises(UnreadCall, match=f"of {len(lead) + 1} dimensions"):
            new(torch.randn(*lead, 32))


class OfImages(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.words, self.mlp = nn.Embedding(50, 32), block

    def forward(self, input_ids: Tensor) -> Any:
        return self.mlp(self.words(input_ids).unflatten(1, (2, -1)))


class ChannelsFirst(Plain):
    """However many places there are."""

    def forward(self, hidden_states: Tensor) -> Any:
        rows = hidden_states.flatten(2).transpose(1, 2)
        if rows.shape[-1] != self.hidden:
            raise ValueError("no channels")
        return super().forward(rows).transpose(1, 2).reshape(hidden_states.shape)


@pytest.mark.parametrize("sides", [(2, 12), (2, 3, 4)], ids=str)
def test_a_block_with_channels_first_is_read_with_as_many_places_as_the_model_gives(sides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block = plain.make(block_class(ChannelsFirst, *LISTED, name="ChannelsFirst"))

    class OfPlaces(OfImages):
        def forward(self, input_ids: Tensor) -> Any:
            return self.mlp(self.words(input_ids).transpose(1, 2).reshape(sides[0], 32, *sides[1:]))

    model, ids = OfPlaces(block).eval(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids)
        [step] = moe_surgery.apply(model, target="reference", model_check={"input_ids": ids}).steps
        assert step.outcome == "replaced", step.reason
        assert distance(model(ids), before) < 64


@pytest.mark.parametrize("kind", [Plain, ByMatch, ByStar, WithBatchedLogits, WithALossOfRows])
def test_a_block_that_the_model_gives_images_is_read_with_these(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model = OfImages(plain.make(block_class(kind, *LISTED, name=kind.__name__))).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids)
        [step] = moe_surgery.apply(model, target="reference", model_check={"input_ids": ids}).steps
        assert step.outcome == "replaced", step.reason
        after = model(ids)
    for one, other in zip(*(a if isinstance(a, tuple) else (a,) for a in (before, after)), strict=True):
        assert one.shape == other.shape and distance(other, one) < 64
