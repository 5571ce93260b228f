"""Sizes that come from the batch: ordinary numbers and shapes that object when code branches on them.

They calculate and index as integers do, so that code which only shapes tensors with them runs unchanged. What they
object to is every way of telling one batch size from another. Two ways can't be seen in Python: multiplying a plain
float by a size, and the indices of a loop over one; reading therefore records batches of several sizes as well.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_surgery.read.record.branches import Branches, tells_sizes_apart

BATCH = "the batch size"
DEPENDS = f"what it does depends on {BATCH}"
MOST_ADDED = 0.01
"""Of a number of tokens, how much more a divisor may be: an epsilon."""


def _comparison(compare: Callable[[Any, Any], bool], plain: Callable[[Any, Any], Any]) -> Any:
    def method(self: BatchSize, other: object) -> Any:
        if isinstance(other, (int, float)) and not isinstance(other, BatchSize):
            if self._branches is not None and (not self.pure or tells_sizes_apart(compare, other)):
                return self._branches.answer(compare, int.__index__(self), other, self.pure)
            if not self.pure or tells_sizes_apart(compare, other):
                raise self._object(f"what it does depends on {self._what} (compares it with {other})")
            return compare(int.__index__(self), other)
        if isinstance(other, BatchSize) and not (self.pure and other.pure):
            raise self._object(f"what it does depends on {self._what} (compares numbers made of it)")
        if isinstance(other, BatchSize) and self._branches is not None and other._branches is not None:
            return self._branches.between(compare, int.__index__(self), int.__index__(other))
        return plain(self, other)

    return method


def _calculation(plain: Callable[[Any, Any], Any], swapped: bool = False) -> Any:
    def method(self: BatchSize, other: object) -> Any:
        if not isinstance(other, int):
            return self._number(plain, other)
        left, right = int.__index__(self), int.__index__(other)
        if isinstance(other, BatchSize):
            sizes = self.pure and other.pure and self.of_batch and other.of_batch
            if plain is operator.mod and sizes and right and left % right == 0:
                return 0  # batches are such that one size is a multiple of another only where it always is
            pure = self.pure and other.pure and plain in (operator.add, operator.sub, operator.mul)
        else:
            same = right == 0 if plain in (operator.add, operator.sub) else plain is operator.floordiv and right == 1
            pure = self.pure and (plain is operator.mul or same)
        return self._like(plain(right, left) if swapped else plain(left, right), pure, other)

    return method


def _objection(deed: str) -> Any:
    def method(self: BatchSize, *others: object) -> Any:
        raise self._object(f"it {deed} {self._what}")

    return method


class BatchSize(int):
    """A number of tokens. ``pure`` ones are numbers of tokens, their sums, differences and multiples.

    ``origin`` says which known tensor it was asked of, if it was.

    Comparing loads is allowed, since records of different loads show what comes of it, and so is telling a sign.
    Comparing two sizes of the batch is a branch.
    """

    _object: Callable[[str], Exception]
    _what: str
    pure: bool
    _branches: Branches | None
    origin: Any = None

    @classmethod
    def of(
        cls,
        value: int,
        object_to: Callable[[str], Exception],
        what: str = BATCH,
        pure: bool = True,
        branches: Branches | None = None,
    ) -> BatchSize:
        size = cls(value)
        size._object, size._what, size.pure, size._branches = object_to, what, pure, branches
        return size

    @property
    def of_batch(self) -> bool:
        """Whether it is a size of the batch itself, and not how many tokens an expert got."""
        return self._what == BATCH

    def objected(self, reason: str) -> Exception:
        """The exception to raise for what a record can't show."""
        return self._object(reason)

    def compared(self, compare: Callable[[Any, Any], bool], number: float, other: float) -> bool:
        """The answer to a comparison of a ``number`` made of this one with a plain one."""
        if self._branches is None:
            raise self._object(f"what it does depends on {self._what} (compares it with {other})")
        return self._branches.answer(compare, number, other, pure=False)

    def made(self, value: int) -> BatchSize:
        """A whole number calculated from this one."""
        return self._like(value, pure=False)

    def _like(self, value: int, pure: bool, other: object = None) -> BatchSize:
        branches = self._branches if not isinstance(other, BatchSize) or other._branches is not None else None
        return BatchSize.of(value, self._object, self._what, pure, branches)

    def __bool__(self) -> bool:
        return bool(self != 0)

    __eq__ = _comparison(operator.eq, int.__eq__)
    __ne__ = _comparison(operator.ne, int.__ne__)
    __lt__ = _comparison(operator.lt, int.__lt__)
    __le__ = _comparison(operator.le, int.__le__)
    __gt__ = _comparison(operator.gt, int.__gt__)
    __ge__ = _comparison(operator.ge, int.__ge__)

    __mul__ = __rmul__ = _calculation(operator.mul)
    __add__ = __radd__ = _calculation(operator.add)
    __sub__ = _calculation(operator.sub)
    __rsub__ = _calculation(operator.sub, swapped=True)
    __floordiv__ = _calculation(operator.floordiv)
    __mod__ = _calculation(operator.mod)

    def __hash__(self) -> int:
        # No objection: code that remembers what it did for a shape can do without, and is held against plain numbers.
        raise TypeError(f"{self._what} is no key")

    def __neg__(self) -> BatchSize:
        return self._like(-int.__index__(self), self.pure)

    def __truediv__(self, other: object) -> Any:
        return self._number(operator.truediv, other)

    def __rtruediv__(self, other: object) -> Any:
        return self._number(operator.truediv, other, swapped=True)

    def _number(self, plain: Callable[[Any, Any], Any], other: object, swapped: bool = False) -> Any:
        """A number that isn't whole, made by multiplying or dividing a size of the batch."""
        scales = plain in (operator.mul, operator.truediv) or (plain is operator.add and not swapped)
        number = isinstance(other, (int, float)) and not isinstance(other, BatchSize)
        if not (scales and number and self.pure and self.of_batch):
            raise self._object(f"it calculates with {self._what}")
        made = BatchNumber.of(self)
        return plain(other, made) if swapped else plain(made, other)

    __rfloordiv__ = __rmod__ = __divmod__ = __rdivmod__ = _objection("calculates with")
    __pow__ = __rpow__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _objection("calculates with")
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _objection("calculates with")
    __abs__ = __round__ = __trunc__ = __ceil__ = __floor__ = _objection("calculates with")
    __int__ = __float__ = _objection("makes a plain number of")

    def __str__(self) -> str:
        return BatchText.of(format(int.__index__(self)), self)

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        return BatchText.of(format(int.__index__(self), form), self)

    bit_length = bit_count = to_bytes = as_integer_ratio = conjugate = _objection("calculates with")


class BatchText(str):
    """A size of the batch as text. People may be told of it, in logs, among other words; alone it isn't compared."""

    _object: Callable[[str], Exception]
    _what: str

    @classmethod
    def of(cls, text: str, size: BatchSize) -> BatchText:
        made = cls(text)
        made._object, made._what = size._object, size._what
        return made

    __eq__ = __ne__ = __hash__ = __lt__ = __gt__ = __contains__ = _objection("makes text of")


def _compared(compare: Callable[[Any, Any], bool]) -> Any:
    def method(self: BatchNumber, other: object) -> bool:
        if isinstance(other, (BatchSize, BatchNumber)) or not isinstance(other, (int, float)):
            raise self.source.objected(f"what it does depends on {BATCH} (compares numbers made of it)")
        return self.source.compared(compare, float.__float__(self), other)

    return method


def _product(of_power: int, swapped: bool = False) -> Any:
    """Multiplication (1) or division (-1) by a number; ``swapped``: of a number by this."""

    def method(self: BatchNumber, other: object) -> Any:
        if isinstance(other, Tensor):  # which says what comes of it
            return NotImplemented
        if not isinstance(other, (int, float)) or isinstance(other, (BatchSize, BatchNumber)) or self.plus:
            raise self.source.objected(f"it calculates with {BATCH}")
        if swapped:
            return BatchNumber.of(self.source, other / self.times, -self.power)
        return BatchNumber.of(self.source, self.times * other if of_power > 0 else self.times / other, self.power)

    return method


def _refusal(deed: str) -> Any:
    def method(self: BatchNumber, *others: object) -> Any:
        raise self.source.objected(f"it {deed} {BATCH}")

    return method


def _sum(self: BatchNumber, other: object) -> Any:
    """With a number added that only keeps statistics from being divided by zero."""
    small = isinstance(other, (int, float)) and not isinstance(other, (BatchSize, BatchNumber))
    if not small or not 0 <= other <= MOST_ADDED or self.power < 0 or self.plus:  # type: ignore[operator]
        raise self.source.objected(f"it calculates with {BATCH}")
    return BatchNumber.of(self.source, self.times, plus=float(other))  # type: ignore[arg-type]


class BatchNumber(float):
    """A number made of sizes of the batch by multiplying and dividing: ``times * source ** power + plus``.

    Statistics are divided by such numbers, and capacities calculated of them. ``power`` is 1 or -1.
    """

    source: BatchSize
    times: float
    power: int
    plus: float

    @classmethod
    def of(cls, source: BatchSize, times: float = 1.0, power: int = 1, plus: float = 0.0) -> BatchNumber:
        number = cls(scaled(int.__index__(source), times, power) + plus)
        number.source, number.times, number.power, number.plus = source, times, power, plus
        return number

    @property
    def pure(self) -> bool:
        """Whether it is a multiple of a size, or a part of a number by one."""
        return self.source.pure

    @property
    def of_batch(self) -> bool:
        return self.source.of_batch

    __mul__ = __rmul__ = _product(1)
    __truediv__ = _product(-1)
    __rtruediv__ = _product(-1, swapped=True)
    __eq__ = _compared(operator.eq)
    __ne__ = _compared(operator.ne)
    __lt__ = _compared(operator.lt)
    __le__ = _compared(operator.le)
    __gt__ = _compared(operator.gt)
    __ge__ = _compared(operator.ge)

    def __ceil__(self) -> int:
        return self.source.made(math.ceil(float.__float__(self)))

    def __floor__(self) -> int:
        return self.source.made(math.floor(float.__float__(self)))

    def __trunc__(self) -> int:
        return self.source.made(math.trunc(float.__float__(self)))

    def __hash__(self) -> int:
        raise TypeError(f"a number made of {BATCH} is no key")

    __add__ = __radd__ = _sum
    __sub__ = __rsub__ = _refusal("calculates with")
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refusal("calculates with")
    __pow__ = __rpow__ = __abs__ = __neg__ = __round__ = _refusal("calculates with")
    __bool__ = _refusal("asks for the truth of")
    __int__ = __float__ = _refusal("makes a plain number of")
    __str__ = __repr__ = __format__ = _refusal("makes text of")
    is_integer = as_integer_ratio = conjugate = hex = _refusal("calculates with")


def scaled(size: int, times: float, power: int) -> float:
    """``times * size ** power``."""
    return times * size if power > 0 else times / size


MARKED = (BatchSize, BatchNumber)
