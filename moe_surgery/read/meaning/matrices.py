"""Weights as matrices: which piece of which parameter stands where, whatever views the code takes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from moe_surgery.read.meaning.evaluation import Evaluation, Meaning
from moe_surgery.read.meaning.row_moves import known_places, order, parts, span
from moe_surgery.read.meaning.rows import Array, Rows, Shape, each, objects
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Op
from moe_surgery.weights.layout import Piece, over_one_place

ROWS, COLS = -2, -1
_MOST_ROWS = 1 << 12
Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Mats:
    """An array ``lead`` of pieces [rows, cols], seen by the code as a tensor of any order of dimensions.

    ``dims`` says what each dimension of that tensor runs over: axes of ``lead`` by number, ROWS or COLS of the pieces;
    several of them, the last fastest, or none for a dimension of one.
    """

    lead: Array
    rows: int
    cols: int
    dims: Dims

    def length(self, axis: int) -> int:
        return {ROWS: self.rows, COLS: self.cols}[axis] if axis < 0 else self.lead.shape[axis]

    @property
    def shape(self) -> Shape:
        return tuple(prod(map(self.length, axes)) for axes in self.dims)

    @property
    def sample(self) -> str:
        """A parameter among them, by name."""
        return str(self.lead.reshape(-1)[0].path) if self.lead.size else "a weight"

    def alone(self, dim: int) -> int:
        """The one axis that a dimension runs over."""
        axes = self.dims[dim]
        if len(axes) != 1:
            raise Unreadable(f"it takes a part of several matrices of {self.sample} at once")
        return axes[0]

    def taken(self, dim: int, place: int) -> Mats:
        """One of the matrices along a dimension."""
        if not self.dims[dim] and place in (0, -1):
            return replace(self, dims=self.dims[:dim] + self.dims[dim + 1 :])
        axis = self.alone(dim)
        if axis < 0:
            raise Unreadable(f"it uses one row or column of {self.sample}")
        lead = self.lead.take(place, axis=axis)
        dims = tuple(tuple(a - (a > axis) for a in axes) for number, axes in enumerate(self.dims) if number != dim)
        return Mats(lead if isinstance(lead, np.ndarray) else objects([lead], ()), self.rows, self.cols, dims)

    def cut(self, dim: int, start: int, stop: int) -> Mats:
        """A range along a dimension."""
        if (start, stop) == (0, self.shape[dim]):
            return self
        axis = self.alone(dim)
        if axis >= 0:
            return replace(self, lead=self.lead.take(range(start, stop), axis=axis))
        if axis == COLS:
            return replace(
                self, lead=each(self.lead, lambda piece: strip(piece, start, stop, self.cols)), cols=stop - start
            )
        return replace(self, lead=each(self.lead, lambda piece: band(piece, start, stop)), rows=stop - start)

    def viewed(self, shape: Shape) -> Mats:
        """The same elements in the same order, in other dimensions."""
        held = *self.lead.shape, self.rows, self.cols
        if len(held) > 2 and over_one_place(held) and shape == held[:2]:  # that of a convolution, as it uses it
            whole = of(self.sample, held)
            if self.dims == whole.dims and list(self.lead.flat) == list(whole.lead.flat):
                return of(self.sample, shape)
        value, waiting, dims = self, [axis for axes in self.dims for axis in axes], []
        for size in shape:
            axes: list[int] = []
            left = size
            while left > 1:
                length = value.length(waiting[0])
                if left % length:
                    value, waiting = value._split(waiting, left)
                    length = left
                axes.append(waiting.pop(0))
                left //= length
            dims.append(tuple(axes))
        return replace(value, dims=tuple(dims))

    def _split(self, waiting: list[int], outer: int) -> tuple[Mats, list[int]]:
        """The first of the axes split into ``outer`` times what remains."""
        axis, length = waiting[0], self.length(waiting[0])
        if length % outer or axis == COLS:
            raise Unreadable(f"it views {self.sample} in a shape that breaks its matrices")
        inner = length // outer
        if axis == ROWS:
            bands = [each(self.lead, lambda p, n=n: band(p, n * inner, (n + 1) * inner)) for n in range(outer)]  # type: ignore[misc]
            return replace(self, lead=np.stack(bands, axis=-1), rows=inner), [self.lead.ndim, ROWS, *waiting[1:]]
        lead = self.lead.reshape(*self.lead.shape[:axis], outer, inner, *self.lead.shape[axis + 1 :])
        return replace(self, lead=lead), [axis, axis + 1, *(a + (a > axis) for a in waiting[1:])]


def of(path: str, shape: Shape) -> Mats:
    """A parameter of two dimensions, or of more, as matrices."""
    if len(shape) == 2:
        return Mats(objects([Piece(path)], ()), *shape, dims=((ROWS,), (COLS,)))
    if len(shape) < 2:
        raise Unreadable(f"{path} has {len(shape)} dimensions")
    lead = objects([Piece(path, index) for index in range(prod(shape[:-2]))], shape[:-2])
    rows, cols = shape[-2:]
    return Mats(lead, rows, cols, dims=(*((axis,) for axis in range(lead.ndim)), (ROWS,), (COLS,)))


def as_rows(mats: Mats) -> list[Piece] | None:
    """The rows of matrices in order, one piece each, if the last dimension runs along them; else None."""
    axes = [axis for dim in mats.dims for axis in dim]
    last = mats.dims[-1] if mats.dims else ()
    along = last == (COLS,) or (last == (ROWS, COLS) and mats.rows == 1)
    if not along or axes != [*range(mats.lead.ndim), ROWS, COLS] or mats.lead.size * mats.rows > _MOST_ROWS:
        return None
    return [row(piece, number) for piece in mats.lead.reshape(-1) for number in range(mats.rows)]


def row(piece: Piece, number: int) -> Piece:
    """Row ``number`` of a matrix that is a whole parameter, as the bias that it may be."""
    if piece.index is not None or piece.transposed or piece.out is not None:
        raise Unreadable(f"it uses single rows of {piece.path}")
    return Piece(piece.path, number + (piece.rows[0] if piece.rows else 0))


def band(piece: Piece, start: int, stop: int) -> Piece:
    """Rows ``start:stop`` of a piece."""
    first = piece.rows[0] if piece.rows else 0
    return replace(piece, rows=(first + start, first + stop))


def strip(piece: Piece, start: int, stop: int, total: int) -> Piece:
    """Columns ``start:stop`` of a piece that has ``total``."""
    first, _, total = piece.cols or (0, 0, total)
    return replace(piece, cols=(first + start, first + stop, total))


def turned(piece: Piece) -> Piece:
    """A piece whose columns are its outputs."""
    if piece.cols is None:
        return replace(piece, transposed=True)
    return replace(piece, transposed=True, cols=None).outputs(*piece.cols[:2])


def _same(run: Evaluation, op: Op) -> Mats:
    # Weights are read at one dtype; what matters is the dtype that the map is computed in.
    value: Mats = run.value(op.args[0])
    return value


def _select(run: Evaluation, op: Op) -> Mats | Rows:
    value: Mats = run.value(op.args[0])
    if value.dims == ((ROWS,), (COLS,)) and op.args[1] % 2 == 0:
        return Rows(objects([_bias(run, value, op.args[2] % value.rows)], ()), value.cols)
    return value.taken(op.args[1] % len(value.shape), op.args[2])


def _bias(run: Evaluation, value: Mats, number: int) -> Term:
    piece: Piece = value.lead[()]  # type: ignore[assignment]
    return run.terms.param(row(piece, number), value.cols)


def _index(run: Evaluation, op: Op) -> Mats | Rows:
    value: Mats = run.value(op.args[0])
    places = known_places(run, op.args[1] if op.name == "index" else [op.args[2]])
    first = 0 if op.name == "index" else op.args[1] % len(value.shape)
    if value.dims == ((ROWS,), (COLS,)) and first == 0 and len(places) == 1 and not isinstance(places[0], slice):
        numbers = np.arange(value.rows)[places[0]]
        items = [_bias(run, value, number) for number in numbers.reshape(-1).tolist()]
        return Rows(objects(items, numbers.shape), value.cols)
    axes = [value.alone(first + number) for number in range(len(places))]
    if min(axes) < 0 or any(isinstance(place, slice) for place in places):
        raise Unreadable(f"it uses single rows of {value.sample}")
    lead = np.moveaxis(value.lead, axes, range(len(axes)))[places]
    lead = lead if isinstance(lead, np.ndarray) else objects([lead], ())
    made = lead.ndim - (value.lead.ndim - len(axes))
    others = [axis for axis in range(value.lead.ndim) if axis not in axes]
    number_of = {axis: made + number for number, axis in enumerate(others)}
    dims = [tuple(number_of.get(axis, axis) for axis in axes) for axes in value.dims]
    return replace(value, lead=lead, dims=(*dims[:first], *((n,) for n in range(made)), *dims[first + len(axes) :]))


def _permute(run: Evaluation, op: Op) -> Mats:
    value: Mats = run.value(op.args[0])
    return replace(value, dims=tuple(value.dims[dim] for dim in order(value.shape, op)))


def _split(run: Evaluation, op: Op) -> tuple[Mats, ...]:
    value: Mats = run.value(op.args[0])
    return tuple(value.cut(*part) for part in parts(value.shape, op))


def _slice(run: Evaluation, op: Op) -> Mats:
    value: Mats = run.value(op.args[0])
    dim, start, stop, step = span(value.shape, op)
    if step != 1:
        raise Unreadable(f"it uses every {step}th row or column of {value.sample} (stored interleaved)")
    return value.cut(dim, start, stop)


def _unbind(run: Evaluation, op: Op) -> tuple[Mats, ...]:
    value: Mats = run.value(op.args[0])
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(value.shape)
    return tuple(value.taken(dim, place) for place in range(value.shape[dim]))


def _view(run: Evaluation, op: Op) -> Mats:
    value: Mats = run.value(op.args[0])
    return value.viewed(op.shape)


def _expand(run: Evaluation, op: Op) -> Mats:
    value: Mats = run.value(op.args[0])
    extra = len(op.shape) - len(value.dims)
    lead, dims = value.lead, [*((),) * extra, *value.dims]
    for number, (size, axes) in enumerate(zip(op.shape, dims, strict=True)):
        if not axes and size > 1:
            dims[number] = (lead.ndim,)
            lead = np.broadcast_to(lead[..., None], (*lead.shape, size))
    return replace(value, lead=lead, dims=tuple(dims))


def _joined(run: Evaluation, op: Op) -> Mats:
    values: list[Mats] = [run.value(item) for item in op.args[0]]
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(op.shape)
    first = values[0]
    for value in values:
        if not isinstance(value, Mats) or value.dims != first.dims or value.lead.shape != first.lead.shape:
            raise Unreadable(f"it joins {first.sample} with what isn't a matrix of the same kind")
        if (value.rows, value.cols) != (first.rows, first.cols):
            raise Unreadable(f"it joins {first.sample} with a matrix of another size")
    lead, new = np.stack([value.lead for value in values], axis=-1), first.lead.ndim
    if op.name == "stack":
        return replace(first, lead=lead, dims=(*first.dims[:dim], (new,), *first.dims[dim:]))
    return replace(first, lead=lead, dims=(*first.dims[:dim], (new, *first.dims[dim]), *first.dims[dim + 1 :]))


_VIEWS = ["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"]

MEANINGS: dict[str, Meaning] = {
    **dict.fromkeys(["detach", "alias", "clone", "contiguous", "lift_fresh", "_to_copy"], _same),
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    **dict.fromkeys(["split", "split_with_sizes"], _split),
    **dict.fromkeys(["index", "index_select"], _index),
    **dict.fromkeys(["cat", "stack"], _joined),
    **dict.fromkeys(_VIEWS, _view),
    "select": _select,
    "slice": _slice,
    "unbind": _unbind,
    "expand": _expand,
}
