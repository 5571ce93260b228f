"""Experts that are called with tokens in slots of each: replaced alone, in the forms that they take and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import plain, slots
from zoo.same import distance

import moe_surgery
from moe_surgery.errors import SurgeryError
from moe_surgery.slots import Slots
from moe_surgery.targets.base import SwappedBlock

FORMS = (Slots(4, 0, 3), Slots(4, 1, 3), Slots(4, 0, 4), Slots(4, 1, 4))


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class AnyBank(slots.Bank):
    """Slots [E, C, H], or with one more dimension."""

    def forward(self, slots: Tensor) -> Tensor:
        up = torch.einsum("e...h,ehw->e...w", slots, self.w1).relu()
        return torch.einsum("e...w,ewh->e...h", up, self.w2)


class Both(slots.Capacity):
    bank = AnyBank


def replaced(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, SwappedBlock]:
    """The experts of a block, and what they were replaced by."""
    model = Model(plain.make(kind, dtype=dtype)).eval()
    old = model.mlp.experts
    [step] = moe_surgery.apply(model, target="reference").steps
    assert (step.path, step.outcome) == ("mlp.experts", "replaced"), step.reason
    assert isinstance(model.mlp.experts, SwappedBlock)
    return old, model.mlp.experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [slots.DropsTokens, slots.DropsTokensInGroups, slots.SlotsFirst])
def test_experts_of_slots_are_replaced_in_any_dtype(kind: type[nn.Module], dtype: torch.dtype) -> None:
    old, new = replaced(kind, dtype)
    shape = {"DropsTokens": (4, 5), "DropsTokensInGroups": (2, 4, 5), "SlotsFirst": (5, 4)}[kind.__name__]
    with torch.no_grad():
        for empty in (False, True):
            x = torch.randn(*shape, slots.HIDDEN, dtype=dtype)
            x = x.narrow(-3 if kind is slots.SlotsFirst else -2, 0, 0) if empty else x
            one, other = old(x), new(x)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert empty or distance(other, one) < 64


def test_every_form_that_experts_take_is_taken_and_no_other() -> None:
    old, new = replaced(Both)
    with torch.no_grad():
        for shape in ((4, 3), (4, 2, 3), (4, 1, 1), (4, 4, 4)):
            x = torch.randn(*shape, slots.HIDDEN)
            assert distance(new(x), old(x)) < 64
        for shape in ((3, 4), (4,), (2, 4, 3), (4, 2, 2, 2)):
            with pytest.raises(SurgeryError, match="not read with"):
                new(torch.randn(*shape, slots.HIDDEN))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tokens_are_put_into_slots_of_their_experts_and_found_again(form: Slots) -> None:
    ids = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3]])  # none goes to 2
    tensors = {"hidden_states": torch.arange(1.0, 9).view(4, 2), "ids": ids, "weights": torch.rand(4, 2)}
    x = form.given(tensors)
    assert form.fits(x) and x.ndim == form.dimensions
    taken = form.taken(x)
    factors = 10.0 ** torch.arange(4)
    y = (taken["hidden_states"] * factors[taken["ids"]]).view(x.shape)
    wanted = tensors["hidden_states"] * (tensors["weights"] * factors[ids]).sum(-1, keepdim=True)
    assert torch.allclose(form.combined(y, tensors), wanted)
