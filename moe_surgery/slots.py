"""Experts that are called with tokens in slots, so many for each: whoever calls them has routed already.

Blocks with a capacity, with experts that choose their tokens, or with slots that are mixtures of tokens call a module
of all experts so. As a row's place tells its expert, such a module is one of experts alone: its input gives ids and
weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """An input of so many ``dimensions``, the last of them [H], in which ``axis`` has one place for each expert.

    ``others`` are further forms that are taken too, of other numbers of dimensions.
    """

    experts: int
    axis: int
    dimensions: int
    others: tuple[Slots, ...] = ()

    def fits(self, x: Any) -> bool:
        """Whether ``x`` is of this form, or one of the others."""
        return self._of(x) is not None

    def _of(self, x: Any) -> Slots | None:
        shape = tuple(getattr(x, "shape", ()))
        forms = (form for form in (self, *self.others) if form.dimensions == len(shape))
        return next((form for form in forms if shape[form.axis] == form.experts), None)

    def sizes(self, lead: tuple[int, int]) -> tuple[int, ...]:
        """The dimensions of an input before the last; ``lead`` are those that aren't the experts', the last first."""
        others = lead[::-1] if self.dimensions == 4 else lead[:1]
        return (*others[: self.axis], self.experts, *others[self.axis :])

    def ids(self, lead: tuple[int, ...], device: Any = None) -> Tensor:
        """The expert of each row [T, 1] of an input whose dimensions before the last are ``lead``."""
        import torch

        numbers = torch.arange(self.experts, device=device).view(-1, *(1 for _ in lead[self.axis + 1 :]))
        return numbers.expand(lead).reshape(-1, 1)

    def taken(self, x: Tensor) -> dict[str, Tensor]:
        """Tokens [T, H], ids [T, 1] and weights [T, 1] of an input that :meth:`fits`; and itself, as "slots"."""
        form = self._of(x)
        assert form is not None
        ids = form.ids(tuple(x.shape[:-1]), x.device)
        return {"hidden_states": x.reshape(-1, x.shape[-1]), "ids": ids, "weights": x.new_ones(ids.shape), "slots": x}

    def given(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tokens [T, H] in slots of the experts that their ids [T, k] say; slots that are left over are zero."""
        x, ids = tensors["hidden_states"], tensors["ids"]
        places = self._places(ids)
        most = int(places.max()) + 1 if places.numel() else 0
        slots = x.new_zeros(self.experts, most, x.shape[-1])
        slots[ids.flatten().long(), places] = x.repeat_interleave(ids.shape[-1], 0)
        slots = slots if self.dimensions == 3 else slots[:, None]
        return slots.movedim(0, self.axis).contiguous()

    def combined(self, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What becomes of the tokens that :meth:`given` put into slots, by their weights [T, k]."""
        ids, weights = tensors["ids"], tensors["weights"]
        slots = y.movedim(self.axis, 0).reshape(self.experts, -1, y.shape[-1])
        found = slots[ids.flatten().long(), self._places(ids)].view(*ids.shape, y.shape[-1])
        work = found.double() if y.element_size() > 4 else found.float()
        return (work * weights.to(work.dtype)[..., None]).sum(-2).to(y.dtype)

    def _places(self, ids: Tensor) -> Tensor:
        """Which slot of its expert each of the ids [T, k] gets, [T * k]."""
        import torch

        told = torch.nn.functional.one_hot(ids.flatten().long(), self.experts)
        return ((told.cumsum(0) - 1) * told).sum(-1)
