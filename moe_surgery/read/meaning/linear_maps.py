"""What products with matrices mean on rows of terms: linear maps, and sums of rows by computed factors."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from moe_surgery.read.meaning import rows
from moe_surgery.read.meaning.evaluation import Evaluation, Meaning
from moe_surgery.read.meaning.matrices import COLS, ROWS, Mats, turned
from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.rows import Array, Rows, each, objects
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Op

_MOST_FACTORS = 1 << 20


def _matmul(run: Evaluation, op: Op) -> Rows:
    return _product(run, op.args[0], op.args[1], op)


def _addmm(run: Evaluation, op: Op) -> Rows:
    if op.kwargs.get("beta", 1) != 1 or op.kwargs.get("alpha", 1) != 1:
        raise Unreadable("it scales a bias")
    bias, product = run.rows(op.args[0]), _product(run, op.args[1], op.args[2], op)
    return rows.combine([bias, product], run.terms.add, run.terms)


def _product(run: Evaluation, first: Any, second: Any, op: Op) -> Rows:
    """A product of vectors with matrices of weights, on either side."""
    left, right = run.value(first), run.value(second)
    if isinstance(left, Mats) and isinstance(right, Rows):
        flipped = replace(left, dims=(*left.dims[:-2], left.dims[-1], left.dims[-2]))
        return _linear(run, right.flipped(), flipped, op).flipped()
    if isinstance(left, Mats) and isinstance(right, Mats):
        raise Unreadable("it multiplies weights by weights")
    if not isinstance(right, Mats):
        return _contracted(run, run.rows(first), run.rows(second))
    return _linear(run, run.rows(first), right, op)


def _contracted(run: Evaluation, left: Rows, right: Rows) -> Rows:
    """``left @ right`` of computed tensors, such as the dispatch of tokens by a mask: sums of rows of one of them."""
    if left.after == 1 and left.size not in (None, 1) and (right.size in (None, 1) or right.after):
        return _contracted(run, right.flipped(), left.flipped()).flipped()
    right = rows.vectors(right, run.terms)
    factors = rows.scalars(left, run.terms).lead
    if factors.ndim < 2 or factors.shape[:-2] != right.lead.shape[:-1] or factors.size > _MOST_FACTORS:
        raise Unreadable("it multiplies computed tensors in a way that isn't one sum of rows for each token")
    found = []
    for table, items in zip(
        factors.reshape(-1, *factors.shape[-2:]), right.lead.reshape(-1, right.lead.shape[-1]), strict=True
    ):
        for row in table:
            parts = [
                run.terms.mul(factor, item)
                for factor, item in zip(row, items, strict=True)
                if factor.op != "const" or factor.args[0] != 0.0
            ]
            found.append(run.terms.add(*parts) if parts else run.terms.const(0.0))
    return Rows(objects(found, factors.shape[:-1]), right.size)


def _linear(run: Evaluation, value: Rows, mats: Mats, op: Op) -> Rows:
    """``value @ mats``; the last two dimensions of the matrices are inputs and outputs."""
    value = rows.vectors(value, run.terms)
    if value.lead.ndim == 0 or value.shape[:-2] != mats.shape[:-2]:
        raise Unreadable("it multiplies weights in a way that isn't one linear map per token")
    batch, inputs, outputs = _roles(mats)
    lead = each(mats.lead, turned) if outputs[-1] == COLS else mats.lead
    table = lead.transpose([*batch, *inputs[:-1], *outputs[:-1]])
    table = table.reshape(-1, prod(map(mats.length, inputs[:-1])), prod(map(mats.length, outputs[:-1])))
    vectors = value.lead.reshape(len(table), -1)
    sizes = mats.length(inputs[-1]), mats.length(outputs[-1])
    items = [
        _mapped(run.terms, term, pieces, sizes, op.dtype)
        for row, pieces in zip(vectors, table, strict=True)
        for term in row
    ]
    return Rows(objects(items, value.lead.shape), mats.shape[-1])


def _grouped(run: Evaluation, op: Op) -> Rows:
    """Rows of which each group goes through a matrix of its own; groups are known by where they end."""
    value, mats = run.vectors(op.args[0]), run.value(op.args[1])
    ends = run.value(op.args[2] if len(op.args) > 2 else op.kwargs.get("offs"))
    rest = [*op.args[3:], *(kept for name, kept in op.kwargs.items() if name not in ("offs", "out_dtype"))]
    stacked = isinstance(mats, Mats) and len(mats.dims) == 3 and len(mats.dims[0]) == 1 and mats.dims[0][0] >= 0
    if not stacked or not isinstance(ends, Tensor) or value.lead.ndim != 1 or any(item is not None for item in rest):
        raise Unreadable("it multiplies groups of rows in a way that reading has no meaning for")
    groups = torch.searchsorted(ends.long(), torch.arange(value.lead.size), right=True)
    if bool((groups >= mats.shape[0]).any()):
        raise Unreadable("it multiplies fewer rows than it has")
    chosen = replace(mats, lead=mats.lead.take(groups.numpy(), axis=mats.dims[0][0]))
    found = _linear(run, Rows(value.lead[:, None], value.size), chosen, op)
    return Rows(found.lead[:, 0], found.size)


def _roles(mats: Mats) -> tuple[list[int], list[int], list[int]]:
    """The axes of matrices by role: batch, inputs, outputs. Axes of length one may have got lost in views."""
    *ahead, inputs, outputs = (list(axes) for axes in mats.dims)
    batch = [axis for axes in ahead for axis in axes]
    for axis in {ROWS, COLS, *range(mats.lead.ndim)} - {*batch, *inputs, *outputs}:
        (batch if axis >= 0 else inputs if not inputs or inputs[-1] >= 0 else outputs).append(axis)
    if not inputs or not outputs or {inputs[-1], outputs[-1]} != {ROWS, COLS}:
        raise Unreadable(f"it multiplies by {mats.sample} in a way that mixes its matrices")
    return batch, inputs, outputs


def _mapped(terms: Terms, term: Term, pieces: Array, sizes: tuple[int, int], dtype: str) -> Term:
    """A vector, cut into as many parts as there are ``pieces``, through each one's row of matrices; the sum."""
    width, height = sizes
    results = []
    for number, row in enumerate(pieces):
        part = terms.part(term, number * width, (number + 1) * width)
        maps = [terms.lin(part, piece, height, dtype) for piece in row]
        results.append(terms.cat(maps, height))
    return terms.add(*results)


MEANINGS: dict[str, Meaning] = {"mm": _matmul, "bmm": _matmul, "addmm": _addmm, "_grouped_mm": _grouped}
