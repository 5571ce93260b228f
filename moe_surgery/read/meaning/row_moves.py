"""What moving rows about means: views, indexing, concatenation and adding rows into others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_surgery.read.meaning import rows
from moe_surgery.read.meaning.evaluation import Evaluation, Meaning
from moe_surgery.read.meaning.rows import Array, Rows, each, objects
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Op


def order(shape: tuple[int, ...], op: Op) -> list[int]:
    """Which dimension stands where after a permute, transpose or t."""
    count = len(shape)
    places = list(range(count))
    if op.name == "permute":
        return [dim % count for dim in op.args[1]]
    if op.name == "t" and count < 2:
        return places
    first, second = (dim % count for dim in (op.args[1:] if op.name == "transpose" else (0, -1)))
    places[first], places[second] = places[second], places[first]
    return places


def parts(shape: tuple[int, ...], op: Op) -> list[tuple[int, int, int]]:
    """``(dimension, start, stop)`` of every part that a split makes."""
    dim = (op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", 0)) % len(shape)
    sizes = op.args[1]
    if isinstance(sizes, int):
        sizes = [min(sizes, shape[dim] - start) for start in range(0, shape[dim], sizes)]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [(dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def span(shape: tuple[int, ...], op: Op) -> tuple[int, int, int, int]:
    """``(dimension, start, stop, step)`` of a slice."""
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(shape)
    return dim, *slice(*op.args[2:5]).indices(shape[dim])


def known_places(run: Evaluation, operand: Iterable[Any]) -> tuple[Any, ...]:
    """Index tensors as numpy takes them."""
    known = [run.value(index) for index in operand]
    if not all(index is None or isinstance(index, Tensor) for index in known):
        raise Unreadable("it indexes by computed places")
    return tuple(slice(None) if index is None else index.numpy() for index in known)


def _reshape(run: Evaluation, op: Op) -> Rows:
    return rows.reshaped(run.rows(op.args[0]), op.shape, run.terms)


def _same(run: Evaluation, op: Op) -> Rows:
    return run.rows(op.args[0])


def _expand(run: Evaluation, op: Op) -> Rows:
    return rows.expanded(run.rows(op.args[0]), op.shape, run.terms)


def _copy(run: Evaluation, op: Op) -> Rows:
    return rows.expanded(run.rows(op.args[1]), op.shape, run.terms)


def _repeat(run: Evaluation, op: Op) -> Rows:
    value = run.vectors(op.args[0])
    times = op.args[1]
    if times[-1] == 1:
        return Rows(np.tile(value.lead, times[:-1]), value.size)
    return rows.moved(value, lambda places: places.repeat(times), run.terms)


def _flip(run: Evaluation, op: Op) -> Rows:
    return rows.moved(run.rows(op.args[0]), lambda places: places.flip(op.args[1]), run.terms)


def _index(run: Evaluation, op: Op) -> Rows:
    value, places = run.rows(op.args[0]), known_places(run, op.args[1])
    if value.size is not None and not value.after and len(places) <= value.lead.ndim:
        return Rows(value.lead[places], value.size)
    return Rows(rows.scalars(value, run.terms).lead[places], None)


def _index_select(run: Evaluation, op: Op) -> Rows:
    return _taken(run, run.rows(op.args[0]), known_places(run, [op.args[2]])[0], op.args[1])


def _select(run: Evaluation, op: Op) -> Rows:
    value = run.rows(op.args[0])
    if value.axis(op.args[1]) is None:
        assert value.size is not None
        place = op.args[2] % value.size
        return Rows(each(value.lead, lambda term: run.terms.elem(term, place)), None)
    return value.take(op.args[2], op.args[1])


def _taken(run: Evaluation, value: Rows, places: Any, dim: int) -> Rows:
    if value.axis(dim) is None:
        value = rows.scalars(value, run.terms)
    return value.take(places, dim)


def _cut(run: Evaluation, value: Rows, dim: int, start: int, stop: int, step: int = 1) -> Rows:
    if value.axis(dim) is None:
        count = len(range(start, stop, step))
        return Rows(each(value.lead, lambda term: run.terms.part(term, start, stop, step)), count, value.after)
    return value.take(range(start, stop), dim)


def _slice(run: Evaluation, op: Op) -> Rows:
    value = run.rows(op.args[0])
    dim, start, stop, step = span(value.shape, op)
    if step != 1 and (value.axis(dim) is not None or value.size is None):
        return rows.moved(value, lambda places: torch.ops.aten.slice(places, *op.args[1:]), run.terms)
    return _cut(run, value, dim, start, stop, step)


def _split(run: Evaluation, op: Op) -> tuple[Rows, ...]:
    value = run.rows(op.args[0])
    return tuple(_cut(run, value, *part) for part in parts(value.shape, op))


def _unbind(run: Evaluation, op: Op) -> tuple[Rows, ...]:
    value = run.rows(op.args[0])
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(value.shape)
    return tuple(_taken(run, value, place, dim) for place in range(value.shape[dim]))


def _permute(run: Evaluation, op: Op) -> Rows:
    value = run.rows(op.args[0])
    return value.permuted(order(value.shape, op))


def _joined(run: Evaluation, op: Op, join: Callable[..., Array]) -> Rows:
    values = [value for value in map(run.rows, op.args[0]) if 0 not in value.shape]
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(op.shape)
    if not values:
        return Rows(np.empty(op.shape[:-1], dtype=object), op.shape[-1])
    whole = all(value.size == values[0].size and not value.after for value in values)
    if whole and values[0].size is not None and dim < len(op.shape) - 1:
        return Rows(join([value.lead for value in values], axis=dim), values[0].size)
    if whole and values[0].size is not None and op.name == "cat":
        leads = zip(*(value.lead.reshape(-1) for value in values), strict=True)
        items = [run.terms.cat(list(row), values[0].size) for row in leads]
        return Rows(objects(items, values[0].lead.shape), op.shape[-1])
    return Rows(join([rows.scalars(value, run.terms).lead for value in values], axis=dim), None)


def _cat(run: Evaluation, op: Op) -> Rows:
    return _joined(run, op, np.concatenate)


def _stack(run: Evaluation, op: Op) -> Rows:
    return _joined(run, op, np.stack)


def _write(run: Evaluation, lead: Array, places: Array, items: Array, accumulate: bool) -> Array:
    """``lead`` with ``items`` written or added at flat ``places``. Writing twice to one place has no meaning."""
    lead = lead.copy()
    flat, places = lead.reshape(-1), places.reshape(-1)
    if not accumulate and len(np.unique(places)) != len(places):
        raise Unreadable("it writes to one place more than once")
    for place, item in zip(places.tolist(), items.reshape(-1), strict=True):
        flat[place] = run.terms.add(flat[place], item) if accumulate else item
    return lead


def _index_add(run: Evaluation, op: Op) -> Rows:
    """Rows added, or written, to those of a tensor."""
    target, source = run.vectors(op.args[0]), run.vectors(op.args[3])
    index = known_places(run, [op.args[2]])[0]
    if op.args[1] % len(target.shape) != 0 or target.lead.ndim == 0 or op.kwargs.get("alpha", 1) != 1:
        raise Unreadable("it adds rows in a way that reading has no meaning for")
    places = np.arange(target.lead.size).reshape(target.lead.shape)[index]
    return Rows(_write(run, target.lead, places, source.lead, op.name == "index_add"), target.size)


def _index_put(run: Evaluation, op: Op) -> Rows:
    target, index = run.vectors(op.args[0]), known_places(run, op.args[1])
    accumulate = bool(len(op.args) > 3 and op.args[3])
    if len(index) > target.lead.ndim:
        target = rows.scalars(target, run.terms)
    places = np.arange(target.lead.size).reshape(target.lead.shape)[index]
    new = rows.expanded(run.rows(op.args[2]), (*places.shape, *((target.size,) if target.size else ())), run.terms)
    items = new if target.size else rows.scalars(new, run.terms)
    return Rows(_write(run, target.lead, places, items.lead, accumulate), target.size)


def _scatter(run: Evaluation, op: Op) -> Rows:
    target, index = run.vectors(op.args[0]), run.value(op.args[2])
    dim = op.args[1] % len(target.shape)
    source = run.value(op.args[3])
    adds = op.name == "scatter_add" or bool(
        op.args[4:5] and op.args[4] == "sum" and op.kwargs.get("include_self", True)
    )
    if not isinstance(index, Tensor) or "reduce" in op.kwargs or (op.args[4:5] and not adds):
        raise Unreadable("it scatters in a way that reading has no meaning for")
    shape = tuple(index.shape)
    new = run.rows(op.args[3])
    new = rows.expanded(new, shape, run.terms) if not isinstance(source, (Rows, Tensor)) else new
    if tuple(new.shape) != shape:
        raise Unreadable("it scatters a part of a tensor")
    by_rows = dim < target.lead.ndim and shape[-1] == target.size and bool((index == index[..., :1]).all())
    if by_rows:
        index, items = index[..., 0], rows.vectors(new, run.terms).lead
    else:
        target, items = rows.scalars(target, run.terms), rows.scalars(new, run.terms).lead
    coordinates = list(np.indices(tuple(index.shape)))
    coordinates[dim] = index.numpy()
    places = np.ravel_multi_index(coordinates, target.lead.shape)
    return Rows(_write(run, target.lead, places, items, adds), target.size)


_VIEWS = ["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"]

MEANINGS: dict[str, Meaning] = {
    **dict.fromkeys(_VIEWS, _reshape),
    **dict.fromkeys(["detach", "alias", "clone", "contiguous", "lift_fresh"], _same),
    **dict.fromkeys(["split", "split_with_sizes"], _split),
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    **dict.fromkeys(["scatter", "scatter_add", "scatter_reduce"], _scatter),
    "expand": _expand,
    "copy": _copy,
    "repeat": _repeat,
    "flip": _flip,
    "index": _index,
    "index_select": _index_select,
    "select": _select,
    "slice": _slice,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(["index_add", "index_copy"], _index_add),
    "index_put": _index_put,
}
