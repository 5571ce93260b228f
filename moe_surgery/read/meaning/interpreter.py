"""What a record means: every operation evaluated on rows of terms.

An operation that no meaning is known for can't be read, and the block is left alone with that operation as the reason.
What an operation means is in ``arithmetic.py``, ``linear_maps.py``, ``row_moves.py`` (rows moved about) and
``matrices.py`` (weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_surgery.read.meaning import arithmetic, linear_maps, matrices, row_moves, rows
from moe_surgery.read.meaning.matrices import Mats
from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.rows import Rows, objects
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.flow import Flow, Op, Ref
from moe_surgery.weights.layout import Piece

_ON_ROWS = {**arithmetic.MEANINGS, **row_moves.MEANINGS}


class Interpreter:
    """Evaluates a record, as far as it is asked.

    ``value(ref)`` is a :class:`Rows`, :class:`Mats`, known tensor, or a tuple of them.
    """

    def __init__(self, flow: Flow, terms: Terms) -> None:
        self.flow, self.terms = flow, terms
        self._floats = {"float32", *(op.dtype for op in flow.ops if op.name == "input")}
        self._values: dict[int, Any] = {}
        self._known: dict[str, Any] = {}  # a loop over experts does many things alike once per expert

    def value(self, operand: Any) -> Any:
        """An operand's value: that of a result, or the operand itself."""
        if not isinstance(operand, Ref):
            return operand
        if operand.index not in self._values:
            for index in sorted(self._behind(operand.index)):
                if index not in self._values:  # what an operation means may be asked of another
                    self._values[index] = self._meant(self.flow.ops[index])
        value = self._values[operand.index]
        if isinstance(value, Unreadable):
            raise Unreadable(str(value))
        return value

    def _behind(self, index: int) -> set[int]:
        """An operation and those that its result comes of, but for what is known of already."""
        found, waiting = {index}, [index]
        while waiting:
            more = {before for before in self.flow.ops[waiting.pop()].operands if before not in self._values} - found
            found |= more
            waiting += more
        return found

    def _meant(self, op: Op) -> Any:
        if op.name == "const":
            return self._meaning(op)
        key = f"{op.name}{op.args}{op.kwargs}{op.dtype}"
        if key not in self._known:
            self._known[key] = self._meaning(op)
        return self._known[key]

    def rows(self, operand: Any) -> Rows:
        """An operand as rows of terms: a result, known numbers, or a Python number."""
        value = self.value(operand)
        if isinstance(value, Rows):
            return value
        if isinstance(value, Tensor):
            return rows.lift(value, self.terms)
        if isinstance(value, (bool, int, float)):
            return Rows(objects([self.terms.const(value)], ()), None)
        if isinstance(value, Mats):
            if (pieces := matrices.as_rows(value)) is not None:
                shape = tuple(value.shape)
                return Rows(objects([self.terms.param(piece, shape[-1]) for piece in pieces], shape[:-1]), shape[-1])
            raise Unreadable(f"it uses {value.sample} other than as the matrix of a linear map")
        raise Unreadable("it calculates with what is no tensor")

    def vectors(self, operand: Any) -> Rows:
        """An operand with one term per vector along the last dimension."""
        return rows.vectors(self.rows(operand), self.terms)

    def _meaning(self, op: Op) -> Any:
        """What an operation comes to; or why it can't be read, which matters to what depends on it."""
        if op.objection is not None:
            return Unreadable(op.objection)
        try:
            return self._checked(op, self._evaluate(op))
        except Unreadable as error:
            return error

    def _checked(self, op: Op, value: Any) -> Any:
        """The value, if its shape is what the record says and it is kept in the input's dtype or float32."""
        if isinstance(value, (Rows, Mats)) and tuple(value.shape) != op.shape:
            raise Unreadable(f"aten.{op.name} was read as {tuple(value.shape)}, but gives {op.shape}")
        if isinstance(value, (Rows, Mats)) and op.dtype not in self._floats:
            raise Unreadable(f"it computes in {op.dtype} on the way")
        return value

    def _evaluate(self, op: Op) -> Any:
        if op.name == "input":
            make = {"hidden_states": self.terms.token, "weights": self.terms.given}.get(op.args[0], self.terms.outer)
            tokens = [make(number, op.shape[-1]) for number in range(torch.Size(op.shape[:-1]).numel())]
            return Rows(objects(tokens, op.shape[:-1]), op.shape[-1])
        if op.name == "beside":
            raise Unreadable(f"it calculates with what it is given {op.args[0]}, its input")
        if op.name == "const":
            return op.args[0]
        if op.name == "param":
            return self._param(op)
        if op.name == "item":
            return self.value(op.args[0])[op.args[1]]
        first = op.args[0][0] if op.args and isinstance(op.args[0], (list, tuple)) and op.args[0] else op.args[0]
        first = self.value(first)
        by_kind = matrices.MEANINGS if isinstance(first, Mats) else _ON_ROWS
        handler = linear_maps.MEANINGS.get(op.name) or by_kind.get(op.name)
        if handler is None and isinstance(first, Mats) and matrices.as_rows(first) is not None:
            handler = _ON_ROWS.get(op.name)
        if handler is None:
            what = first.sample if isinstance(first, Mats) else "its values"
            raise Unreadable(f"it applies aten.{op.name} to {what}, which reading has no meaning for")
        try:
            return handler(self, op)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(f"it uses aten.{op.name} in a way that reading has no meaning for") from error

    def _param(self, op: Op) -> Any:
        name, shape = op.args[0], op.shape
        if len(shape) == 0:
            return Rows(objects([self.terms.param(Piece(name), 1)], ()), None)
        if len(shape) == 1:
            return Rows(objects([self.terms.param(Piece(name), shape[0])], ()), shape[0])
        return matrices.of(name, shape)
