"""Tensors as arrays of terms: one dimension is symbolic, the others are real.

A hidden state of shape [batch, length, H] is an array of batch x length terms of size H. Moving rows about, whatever
the spelling (views, masks, gathers, index_add, sorts by expert), is then exact bookkeeping on small object arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]
_MOST_SCALARS = 1 << 18


@dataclass(frozen=True, eq=False)
class Rows:
    """Terms ``lead``, each a vector of ``size`` elements; or scalars if ``size`` is None.

    Vectors lie along the last dimension, or before the last ``after`` dimensions of ``lead``.
    """

    lead: Array
    size: int | None
    after: int = 0
    _scalars: list[Array] = field(default_factory=list, repr=False)

    @property
    def place(self) -> int:
        """Which dimension the vectors lie along."""
        return self.lead.ndim - self.after

    @property
    def shape(self) -> Shape:
        lead = self.lead.shape
        return lead if self.size is None else (*lead[: self.place], self.size, *lead[self.place :])

    def axis(self, dim: int) -> int | None:
        """The axis of ``lead`` that a dimension of the tensor is; None for the one that vectors lie along."""
        dim %= len(self.shape)
        if self.size is None or dim < self.place:
            return dim
        return None if dim == self.place else dim - 1

    def take(self, places: Any, dim: int) -> Rows:
        """Some of the tensor along a dimension that isn't the vectors' own; a single place drops the dimension."""
        axis = self.axis(dim)
        assert axis is not None
        lead = self.lead.take(places, axis=axis)
        single = np.ndim(places) == 0
        after = self.after - 1 if single and axis >= self.place else self.after
        return Rows(lead if isinstance(lead, np.ndarray) else objects([lead], ()), self.size, after)

    def permuted(self, order: list[int]) -> Rows:
        if self.size is None:
            return Rows(self.lead.transpose(order), None)
        place = order.index(self.place)
        axes = [dim - (dim > self.place) for dim in order if dim != self.place]
        return Rows(self.lead.transpose(axes), self.size, self.lead.ndim - place)

    def flipped(self) -> Rows:
        """The tensor with its last two dimensions exchanged."""
        count = len(self.shape)
        return self.permuted([*range(count - 2), count - 1, count - 2])


def each(array: Array, function: Callable[[Any], Any]) -> Array:
    """An object array of ``function`` of every element."""
    return objects([function(item) for item in array.reshape(-1)], array.shape)


def objects(items: list[Any], shape: Shape) -> Array:
    result = np.empty(len(items), dtype=object)
    result[:] = items
    return result.reshape(shape)


def scalars(value: Rows, terms: Terms) -> Rows:
    """The same tensor with one term per element."""
    size = value.size
    if size is None:
        return value
    if not value._scalars:
        if value.lead.size * size > _MOST_SCALARS:
            raise Unreadable("it rearranges single elements of wide vectors")
        items = [terms.elem(term, place) for term in value.lead.reshape(-1) for place in range(size)]
        table = objects(items, (*value.lead.shape, size))
        value._scalars.append(np.moveaxis(table, -1, value.place))
    return Rows(value._scalars[0], None)


def vectors(value: Rows, terms: Terms, after: int = 0) -> Rows:
    """The same tensor with one term per vector along the last dimension, or the one before the last ``after``.

    A lone scalar becomes a vector of one.
    """
    if value.size is not None and value.after == after:
        return value
    table = scalars(value, terms).lead
    if table.ndim == 0:
        return Rows(table, 1)
    table = np.moveaxis(table, table.ndim - 1 - after, -1)
    size = table.shape[-1]
    if size == 0:
        raise Unreadable("it makes an empty vector")
    items = [terms.vec(list(row)) for row in table.reshape(-1, size)]
    return Rows(objects(items, table.shape[:-1]), size, after)


def lift(tensor: Tensor, terms: Terms) -> Rows:
    """Known numbers as terms."""
    shape = tuple(tensor.shape)
    if tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
        value = terms.const(float(tensor.reshape(-1)[0]))
        if tensor.ndim == 0:
            return Rows(objects([value], ()), None)
        return Rows(objects([value] * tensor.shape[:-1].numel(), shape[:-1]), shape[-1])
    if tensor.numel() > _MOST_SCALARS:
        raise Unreadable("it uses a large table of numbers")
    return Rows(objects([terms.const(float(item)) for item in tensor.reshape(-1)], shape), None)


def reshaped(value: Rows, shape: Shape, terms: Terms) -> Rows:
    """``value`` viewed as ``shape``. Vectors stay whole, or are cut or joined whole, wherever that can be."""
    size, after = value.size, value.after
    if after and shape[-after - 1 :] == value.shape[-after - 1 :]:
        return Rows(value.lead.reshape((*shape[: -after - 1], *shape[-after:])), size, after)
    if after and value.lead.shape[-after:] == (1,) * after:
        value = Rows(value.lead.reshape(value.lead.shape[:-after]), size)
    elif after:
        value = scalars(value, terms)
    if value.size is None or value.size == 1:
        alone = bool(shape) and shape[-1] == 1
        return Rows(value.lead.reshape(shape[:-1]), 1) if alone else Rows(value.lead.reshape(shape), None)
    width = value.size
    ones = next((number for number, dim in enumerate(reversed(shape)) if dim != 1), len(shape))
    last = shape[-1 - ones] if ones < len(shape) else 0
    lead = (*shape[: len(shape) - 1 - ones], *(1,) * ones)
    if last == width:
        return Rows(value.lead.reshape(lead), width, ones)
    if last > 0 and width % last == 0:
        cuts = range(0, width, last)
        items = [terms.part(term, start, start + last) for term in value.lead.reshape(-1) for start in cuts]
        return Rows(objects(items, lead), last, ones)
    if last > width and last % width == 0:
        groups = value.lead.reshape(-1, last // width)
        return Rows(objects([terms.cat(list(group), width) for group in groups], lead), last, ones)
    return Rows(scalars(value, terms).lead.reshape(shape), None)


def expanded(value: Rows, shape: Shape, terms: Terms) -> Rows:
    """``value`` broadcast to ``shape``."""
    if 0 in shape:
        return Rows(objects([], shape), None)
    value = value if value.size is not None else vectors(value, terms)
    place = len(shape) - 1 - value.after
    if value.size not in (1, shape[place]):
        raise Unreadable("it broadcasts shapes that don't fit")
    return Rows(np.broadcast_to(value.lead, (*shape[:place], *shape[place + 1 :])), shape[place], value.after)


def moved(value: Rows, function: Callable[[Tensor], Tensor], terms: Terms) -> Rows:
    """``value`` after a pure movement of elements, given as a function on tensors; moves single elements."""
    table = scalars(value, terms).lead
    places = function(torch.arange(table.size).reshape(table.shape))
    return Rows(table.reshape(-1)[places.numpy()], None)


def combine(values: list[Rows], function: Callable[..., Term], terms: Terms) -> Rows:
    """An element-wise function of tensors, broadcast against each other; ``function`` takes and returns terms."""
    if all(value.size is None and value.lead.ndim == 0 for value in values):
        return Rows(objects([function(*(value.lead[()] for value in values))], ()), None)
    if 0 in (shape := np.broadcast_shapes(*(value.shape for value in values))):
        return Rows(objects([], shape), None)
    # Those that lie another way are taken apart, so let that be the smaller ones.
    widest = max(values, key=lambda value: 0 if value.size in (None, 1) else value.lead.size * (value.size or 1))
    values = [_aligned(value, widest.after, terms) for value in values]
    sizes = {value.size for value in values} - {1}
    if len(sizes) > 1:
        raise Unreadable("it combines vectors of different sizes")
    leads = np.broadcast_arrays(*(value.lead for value in values))
    items = [function(*row) for row in zip(*(lead.reshape(-1) for lead in leads), strict=True)]
    return Rows(objects(items, leads[0].shape), sizes.pop() if sizes else 1, widest.after)


def _aligned(value: Rows, after: int, terms: Terms) -> Rows:
    """``value`` with vectors along the dimension before the last ``after``."""
    if value.size is not None and value.after == after:
        return value
    shape = (1,) * (after + 1 - len(value.shape)) + value.shape
    place = len(shape) - 1 - after
    if shape[place] == 1 and len(value.shape) > 0:
        lead = value.lead if value.size == 1 else scalars(value, terms).lead
        return Rows(lead.reshape((*shape[:place], *shape[place + 1 :])), 1, after)
    return vectors(reshaped(value, shape, terms) if shape != value.shape else value, terms, after)


def total(term: Term, size: int, terms: Terms) -> Term:
    """The sum of a vector of ``size`` elements; a term of size 1 in it is repeated."""
    return terms.total(term) if term.size == size else terms.mul(terms.const(size), term)
