"""From a record to a program: what of it made some tensors, to be run again on any batch.

A record was made of one batch. A number in it that is one of that batch's sizes, or a multiple of the number of its
tokens, may come of the batch; whether it does shows where records of two batches are held against each other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_surgery.form import Form
from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.choices import Made
from moe_surgery.read.record.flow import Flow, Given, Op, Ref
from moe_surgery.read.record.lineage import Asked, Chosen, Computed, Origin, Plain, done
from moe_surgery.replay import ENTERING, ROUTING, At, Many, Numbers, Program, Step

_MOST_NUMBERS = 4096
_RANK = frozenset(["topk", "max", "sort"])  # which give values and indices
_MAPS = frozenset(["mm", "addmm", "bmm", "linear", "matmul"])


@dataclass(eq=False)
class Builder:
    """Makes the program of one record, of a call with an input of ``shape``, which is brought into a ``form``."""

    flow: Flow
    shape: tuple[int, ...]
    form: Form | None = None
    steps: list[Step] = field(default_factory=list)
    routed: int | None = None
    _ops: dict[int, At] = field(default_factory=dict)
    _origins: dict[int, At] = field(default_factory=dict)
    _values: dict[int, Tensor] = field(default_factory=dict)

    def program(
        self,
        wanted: Mapping[str, Ref | Given],
        experts: int,
        routed: int | None = None,
        output: Ref | None = None,
        turned: bool = False,
    ) -> Program:
        """The program of what is ``wanted``, by name, of a router of so many ``experts``.

        Weights that are ``turned`` are [k, T].

        With ``routed``, the operation that gives the routed experts' sum, also of the block's ``output`` that comes of
        it. Raises :class:`~moe_surgery.read.reading.Unreadable` for what can't be run again.
        """
        outputs = [(name, self._wanted(name, what).number) for name, what in wanted.items()]
        if turned:
            outputs = [(name, self._turned(number) if name == "weights" else number) for name, number in outputs]
        last = max((number for name, number in outputs if name in ROUTING), default=-1)
        whole = None
        if routed is not None and output is not None:
            self.routed = routed
            whole = self._wanted("", output).number
            if routed not in self._ops:
                raise Unreadable("its output doesn't come of its routed experts")
        flat = len(self.shape) == 2
        return Program(
            tuple(self.steps), tuple(outputs), flat, self._logits(experts, last), whole=whole, form=self.form
        )

    def _turned(self, number: int) -> int:
        turned = self._step(torch.ops.aten.t.default, (At(number),))
        return self._step(torch.ops.aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}).number

    def ids(self, choices: Sequence[Made], count: int) -> Given:
        """The first ``count`` ids [T, k] that choices make, one after another, as something to be wanted."""
        tokens = torch.Size(self.shape[:-1]).numel()
        parts = [choice.ids.reshape(tokens, -1) for choice in choices]
        # However an operation shapes its indices, they are those of one token after another.
        aten = torch.ops.aten
        kept: Any = [
            Computed(aten.reshape.default, (Chosen(choice, tuple(part.shape)), [tokens, choice.k]), {}, None)
            for choice, part in zip(choices, parts, strict=True)
        ]
        kept = [
            Computed(aten.flip.default, (one, [1]), {}, None) if choice.ascending else one
            for choice, one in zip(choices, kept, strict=True)
        ]
        kept = kept[0] if len(kept) == 1 else Computed(torch.ops.aten.cat.default, (kept, 1), {}, None)
        if count != sum(choice.k for choice in choices):
            kept = Computed(torch.ops.aten.slice.Tensor, (kept, 1, 0, count), {}, None)
        return Given("ids", torch.cat(parts, 1)[:, :count], (), "", kept)

    def _wanted(self, name: str, what: Ref | Given) -> At:
        """The step that makes something. Of what can't be run again the reason tells what needs it."""
        try:
            value = what if isinstance(what, Ref) else what.value
            return self._op(value.index) if isinstance(value, Ref) else self._known(what, value)  # type: ignore[arg-type]
        except Unreadable as error:
            told = {"": "what stands around its experts", ENTERING: "what its experts are given"}
            told |= dict.fromkeys(ROUTING, "its routing")
            raise Unreadable(f"{told.get(name, f'what it keeps or returns ({name})')} comes of {error}") from None

    def _known(self, what: Given, value: Tensor) -> At:
        if what.origin is None:
            raise Unreadable("numbers that it makes in a way that can't be followed")
        return self._origin(what.origin, value)

    def _step(self, func: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> At:
        self.steps.append(Step(func, tuple(args), tuple(sorted((kwargs or {}).items()))))
        return At(len(self.steps) - 1)

    def _op(self, index: int) -> At:
        if index not in self._ops:
            op = self.flow.ops[index]
            self._ops[index] = self._experts(op) if index == self.routed else self._of_op(op)
        return self._ops[index]

    def _experts(self, op: Op) -> At:
        return self._step("routed", (self._sized(op.shape), getattr(torch, op.dtype)))

    def _of_op(self, op: Op) -> At:
        if op.name == "input":
            return self._step("input")
        if op.name == "beside":
            return self._step("beside", op.args)
        if op.name == "param":
            return self._step("weight", op.args)
        if op.name == "const":
            if op.origin is None:
                raise Unreadable("numbers of single tokens' places")
            return self._origin(op.origin, op.args[0])
        kwargs = {name: value for name, value in op.kwargs.items() if name != "choice"}
        func = operator.getitem if op.name == "item" else op.func
        return self._step(func, self._sized(self._placed(op.args)), self._sized(self._placed(kwargs)))

    def _placed(self, operands: Any) -> Any:
        """Operands with the steps for references to operations."""
        return _each(lambda leaf: self._op(leaf.index) if isinstance(leaf, Ref) else leaf, operands)

    def _sized(self, operands: Any) -> Any:
        """Operands in which numbers that came of the batch say so."""
        return _each(self._number, operands)

    def _number(self, leaf: Any) -> Any:
        if type(leaf) is not int or leaf < 2:
            return leaf
        tokens = torch.Size(self.shape[:-1]).numel()
        if leaf % tokens == 0:
            return Many("tokens", leaf // tokens, leaf)
        if len(self.shape) == 3 and leaf in self.shape[:-1]:
            return Many("batch" if leaf == self.shape[0] else "sequence", was=leaf)
        sides = () if self.form is None else self.form.sides(self.shape[-2])
        return Many(f"side {sides.index(leaf)}", was=leaf) if leaf in sides else leaf  # type: ignore[arg-type]

    def _origin(self, origin: Origin, value: Tensor) -> At:
        """The step that makes known numbers, which must be ``value`` in this record."""
        found = self._of_origin(origin)
        made = self.value(origin)
        if made.shape != value.shape or not bool((made == value).all()):
            raise Unreadable("numbers that are written to in several places")
        return found

    def _of_origin(self, origin: Any) -> At:
        if id(origin) in self._origins:
            return self._origins[id(origin)]
        if isinstance(origin, Plain):
            if origin.counted:
                raise Unreadable("a tensor that it makes of numbers of tokens in Python")
            if origin.value.numel() > _MOST_NUMBERS:
                raise Unreadable("a table of numbers")
            place = self._step("numbers", (Numbers(_listed(origin.value), origin.value.dtype),))
        elif isinstance(origin, Chosen):
            place = self._chosen(origin.choice)
        elif isinstance(origin, Asked):
            place = self._step(
                origin.func, [self._op(self.flow.asked[origin].index), *self._sized(origin.args)], origin.kwargs
            )
        else:
            place = self._of_computed(origin)
        self._origins[id(origin)] = place
        return place

    def _of_computed(self, origin: Computed) -> At:
        args, kwargs = (self._sized(self._made(operands)) for operands in (origin.args, origin.kwargs))
        place = self._step(origin.func, args, kwargs)
        return place if origin.place is None else self._step(operator.getitem, (place, origin.place))

    def _made(self, operands: Any) -> Any:
        """Operands with the steps for origins."""
        return _each(lambda leaf: self._of_origin(leaf) if isinstance(leaf, Origin) else leaf, operands)

    def _chosen(self, choice: Made) -> At:
        index = next((number for number, op in enumerate(self.flow.ops) if op.made is choice), None)
        if index is None:
            raise Unreadable("the ids of a choice that it doesn't use")
        place = self._op(index)
        return self._step(operator.getitem, (place, 1)) if self.flow.ops[index].name in _RANK else place

    def value(self, origin: Any) -> Tensor:
        """What known numbers were in this record."""
        if isinstance(origin, Plain):
            return origin.value
        if isinstance(origin, Chosen):
            return origin.choice.given.reshape(origin.shape)
        if isinstance(origin, Asked):
            return origin.value
        if id(origin) not in self._values:
            args, kwargs = (
                _each(lambda leaf: self.value(leaf) if isinstance(leaf, Origin) else leaf, operands)
                for operands in (origin.args, origin.kwargs)
            )
            if origin.func._schema.is_mutable:
                args = [args[0].clone(), *args[1:]]
            result = done(origin.func, args, kwargs)
            self._values[id(origin)] = result if origin.place is None else result[origin.place]
        return self._values[id(origin)]

    def _logits(self, experts: int, last: int) -> int | None:
        """The last linear map to one number for each token and expert, up to step ``last``."""
        names = {place.number: self.flow.ops[index] for index, place in self._ops.items()}
        tokens = torch.Size(self.shape[:-1]).numel()
        fits = {number for number, op in names.items() if torch.Size(op.shape).numel() == tokens * experts}
        found = [number for number in fits if names[number].name in _MAPS and names[number].shape[-1] == experts]
        return max((number for number in found if number <= last), default=None)


def _each(function: Callable[[Any], Any], operands: Any) -> Any:
    """``operands`` with ``function`` of every leaf; lists become tuples, which can be compared and hashed."""
    if isinstance(operands, (list, tuple)):
        return tuple(_each(function, item) for item in operands)
    if isinstance(operands, dict):
        return {name: _each(function, value) for name, value in operands.items()}
    return function(operands)


def _listed(values: Tensor) -> Any:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return frozen(values.tolist())
