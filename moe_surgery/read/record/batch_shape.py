"""Shapes of tensors in which some sizes come from the batch."""

from __future__ import annotations

from typing import Any


class BatchShape(tuple[int, ...]):
    """A tensor's shape in which some sizes are :class:`~.batch_size.BatchSize`; ``numel`` of it is one too."""

    def numel(self) -> int:
        product = 1
        for size in self:
            product = size * product
        return product

    def __getitem__(self, place: Any) -> Any:
        item = tuple.__getitem__(self, place)
        return BatchShape(item) if isinstance(place, slice) else item

    def __add__(self, other: Any) -> Any:
        return BatchShape(tuple.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return BatchShape(other + tuple(self))
