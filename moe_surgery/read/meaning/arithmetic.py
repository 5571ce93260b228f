"""What arithmetic means on rows of terms: element-wise functions, sums, softmax and top-k."""

from __future__ import annotations

import math
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_surgery.read.meaning import rows
from moe_surgery.read.meaning.evaluation import Evaluation, Meaning
from moe_surgery.read.meaning.rows import Rows, each, objects
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.choices import ascends
from moe_surgery.read.record.flow import Choice, Op, Ref


def _elementwise(run: Evaluation, op: Op) -> Rows:
    """A function of single elements; its parameters become part of its name. Most are known by name only."""
    if not all(other is None or isinstance(other, (bool, int, float)) for other in op.args[1:]):
        raise Unreadable(f"it applies aten.{op.name} to two computed tensors")
    given = [f"{other:g}" for other in op.args[1:] if other is not None]
    given += [f"{key}={value}" for key, value in op.kwargs.items()]
    name = " ".join([op.name, *given])
    return rows.combine([run.rows(op.args[0])], lambda term: run.terms.fn(name, term), run.terms)


def _clamp(run: Evaluation, op: Op) -> Rows:
    bounds = dict(zip(("min", "max"), op.args[1:], strict=False)) | dict(op.kwargs)
    if op.name != "clamp":
        bounds = {op.name.removeprefix("clamp_"): op.args[1]}
    low, high = bounds.get("min"), bounds.get("max")
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        raise Unreadable("it clamps by computed bounds")
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return rows.combine([run.rows(op.args[0])], lambda term: run.terms.clamp(term, low, high), run.terms)


def _largest(run: Evaluation, op: Op) -> Any:
    """The largest element along the last dimension, of which only the value is known."""
    if len(op.args) < 2 or op.args[1] not in (-1, [-1], len(run.rows(op.args[0]).shape) - 1):
        raise Unreadable("it takes the largest of more than one vector")
    value = run.vectors(op.args[0])
    lead = each(value.lead, run.terms.largest)
    if (number := op.kwargs.get("choice")) is not None:
        lead = each(value.lead, lambda term: run.terms.chosen(term, term, number, 1))
    kept = bool(op.args[2]) if len(op.args) > 2 else bool(op.kwargs.get("keepdim", False))
    found = Rows(lead, 1) if kept else Rows(lead, None)
    return found if op.name == "amax" else (found, None)


def _norm(run: Evaluation, op: Op) -> Rows:
    value = run.vectors(op.args[0])
    power, dims, kept = (*op.args[1:4], *(2, None, False)[len(op.args) - 1 :])[:3]
    if dims not in ([-1], [len(value.shape) - 1]) or not isinstance(power, (int, float)):
        raise Unreadable("it takes a norm of more than one vector")
    lead = each(value.lead, lambda term: run.terms.norm(term, float(power)))
    return Rows(lead, 1) if kept else Rows(lead, None)


def _compared(run: Evaluation, op: Op) -> Rows:
    for operand in op.args:
        source = run.flow.ops[operand.index] if isinstance(operand, Ref) else op
        if source.name == "param":
            raise Unreadable(f"it compares with the values of {source.args[0]}, and no weight's values are looked at")
    raise Unreadable(f"what it does depends on the values it computes ({op.name})")


def _gelu(run: Evaluation, op: Op) -> Rows:
    name = {"none": "gelu", "tanh": "gelu_tanh"}[op.kwargs.get("approximate", "none")]
    return rows.combine([run.rows(op.args[0])], lambda term: run.terms.fn(name, term), run.terms)


def _neg(run: Evaluation, op: Op) -> Rows:
    return rows.combine([run.rows(op.args[0])], lambda term: run.terms.mul(run.terms.const(-1), term), run.terms)


def _cast(run: Evaluation, op: Op) -> Rows:
    return rows.combine([run.rows(op.args[0])], lambda term: run.terms.cast(term, op.dtype), run.terms)


def _mul(run: Evaluation, op: Op) -> Rows:
    return rows.combine([run.rows(arg) for arg in op.args[:2]], run.terms.mul, run.terms)


def _glu(run: Evaluation, op: Op) -> Rows:
    if len(op.args) > 1 and op.args[1] not in (-1, len(op.shape) - 1):
        raise Unreadable("it gates by halves of another dimension than the last")
    value, terms = run.vectors(op.args[0]), run.terms
    half = (value.size or 0) // 2

    def gated(term: Term) -> Term:
        return terms.mul(terms.part(term, 0, half), terms.fn("sigmoid", terms.part(term, half, 2 * half)))

    return Rows(each(value.lead, gated), half)


def _div(run: Evaluation, op: Op) -> Rows:
    if op.kwargs.get("rounding_mode") is not None:
        raise Unreadable("it divides with rounding")
    return rows.combine([run.rows(arg) for arg in op.args[:2]], run.terms.div, run.terms)


def _add(run: Evaluation, op: Op) -> Rows:
    first, second = run.rows(op.args[0]), run.rows(op.args[1])
    if op.name == "rsub":
        first, second = second, first
    factor = run.terms.const(op.kwargs.get("alpha", 1) * (1.0 if op.name == "add" else -1.0))
    return rows.combine([first, second], lambda a, b: run.terms.add(a, run.terms.mul(factor, b)), run.terms)


def _where(run: Evaluation, op: Op) -> Rows:
    mask, yes, no = op.args if op.name == "where" else (op.args[1], op.args[2], op.args[0])
    if not isinstance(run.value(mask), Tensor):
        raise Unreadable("what it does depends on the values it computes (where)")
    return rows.combine([run.rows(mask), run.rows(yes), run.rows(no)], run.terms.pick, run.terms)


def _softmax(run: Evaluation, op: Op) -> Rows:
    if op.args[1] not in (-1, len(op.shape) - 1):
        raise Unreadable("it takes a softmax over another dimension than the last")
    value = run.vectors(op.args[0])
    return Rows(each(value.lead, run.terms.softmax), value.size)


def _sum(run: Evaluation, op: Op) -> Rows:
    value = run.rows(op.args[0])
    count = len(value.shape)
    given = op.args[1] if len(op.args) > 1 and op.args[1] else range(count)
    dims = sorted({dim % count for dim in given})
    length = prod(value.shape[dim] for dim in dims)
    if value.size is None:
        value = rows.vectors(value, run.terms)
    lead, size, after = value.lead, value.size or 1, value.after
    axes = [value.axis(dim) for dim in dims]
    if None in axes:
        lead, size, after = each(lead, lambda term: rows.total(term, size, run.terms)), 1, 0
    for axis in sorted((axis for axis in axes if axis is not None), reverse=True):
        table = np.moveaxis(lead, axis, -1)
        lead = objects([run.terms.add(*row) for row in table.reshape(-1, table.shape[-1])], table.shape[:-1])
        after -= 0 if None in axes or axis < value.place else 1
    if op.name == "mean":
        lead = each(lead, lambda term: run.terms.mul(run.terms.const(1.0 / length), term))
    return rows.reshaped(Rows(lead, size, after), op.shape, run.terms)


def _topk(run: Evaluation, op: Op) -> tuple[Rows, None]:
    scores, number = run.vectors(op.args[0]), op.kwargs["choice"]
    count = op.args[1] if op.name == "topk" else scores.size or 1
    chosen = Rows(each(scores.lead, lambda term: run.terms.chosen(term, term, number, count)), count)
    return _reversed(chosen, run) if ascends(op.name, op.args, op.kwargs) else chosen, None


def _reversed(values: Rows, run: Evaluation) -> Rows:
    return rows.moved(values, lambda places: places.flip(-1), run.terms)


def _gather(run: Evaluation, op: Op) -> Rows:
    values, index = run.vectors(op.args[0]), run.value(op.args[2])
    if not isinstance(index, Tensor):
        raise Unreadable("it gathers by computed places")
    last = op.args[1] in (-1, len(op.shape) - 1)
    if not last and index.shape[-1] == values.size and bool((index == index[..., :1]).all()):  # whole rows
        cut = tuple(slice(size) for size in index.shape[:-1])
        cut = tuple(slice(None) if dim == op.args[1] % index.ndim else part for dim, part in enumerate(cut))
        return Rows(np.take_along_axis(values.lead[cut], index[..., 0].numpy(), op.args[1] % index.ndim), values.size)
    for number, choice in enumerate(run.flow.choices if last else ()):
        if _same_ids(run, choice, index, values):
            return _at_choice(run, number, values, index.shape[-1])
        if choice.made is not None and choice.made.ascending and _same_ids(run, choice, index.flip(-1), values):
            return _reversed(_at_choice(run, number, values, index.shape[-1]), run)
    return rows.moved(values, lambda places: places.gather(op.args[1], index), run.terms)


def _at_choice(run: Evaluation, number: int, values: Rows, count: int) -> Rows:
    """Values at the first ``count`` places that a choice took, the highest first."""
    scores = run.vectors(run.flow.choices[number].scores)
    lead = rows.reshaped(scores, (*values.lead.shape, scores.size or 1), run.terms)

    def pick(value: Term, score: Term) -> Term:
        return run.terms.chosen(value, score, number, count)

    return Rows(rows.combine([values, lead], pick, run.terms).lead, count)


def _same_ids(run: Evaluation, choice: Choice, index: Tensor, values: Rows) -> bool:
    first = choice.ids[..., : index.shape[-1]] if index.ndim else choice.ids
    same = first.numel() == index.numel() and torch.equal(first.reshape(-1), index.reshape(-1))
    return same and run.flow.ops[choice.scores.index].shape[-1] == values.shape[-1]


_ELEMENTWISE = (
    "silu sigmoid relu relu6 tanh exp abs sqrt rsqrt reciprocal log log1p square mish erf sign hardswish hardtanh "
    "hardsigmoid softplus leaky_relu elu celu selu threshold pow round floor ceil nan_to_num"
)
_COMPARED = "eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or maximum minimum"

MEANINGS: dict[str, Meaning] = {
    **dict.fromkeys(_ELEMENTWISE.split(" "), _elementwise),
    **dict.fromkeys(_COMPARED.split(" "), _compared),
    **dict.fromkeys(["add", "sub", "rsub"], _add),
    **dict.fromkeys(["sum", "mean"], _sum),
    **dict.fromkeys(["where", "masked_fill"], _where),
    **dict.fromkeys(["clamp", "clamp_min", "clamp_max"], _clamp),
    **dict.fromkeys(["max", "amax"], _largest),
    "linalg_vector_norm": _norm,
    "gelu": _gelu,
    "neg": _neg,
    "_to_copy": _cast,
    "mul": _mul,
    "glu": _glu,
    "div": _div,
    "_softmax": _softmax,
    **dict.fromkeys(["topk", "sort"], _topk),
    "gather": _gather,
}
