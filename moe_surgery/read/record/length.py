"""``len``, ``int`` and ``float`` that keep marks: Python's own give plain numbers, whatever they are asked of."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from moe_surgery.read.record.batch_size import BatchNumber, BatchSize
from moe_surgery.read.record.reach import functions


class Choices(list[int]):
    """Single tokens' choices of experts, in Python. How many there are is a size of the batch, wherever it is asked."""

    def __init__(self, ids: list[int], mark: Callable[[int], int], object_to: Callable[[str], Exception]) -> None:
        super().__init__(ids)
        self.mark, self._object = mark, object_to

    def __getitem__(self, place: Any) -> Any:
        item = super().__getitem__(place)
        return Choices(item, self.mark, self._object) if isinstance(place, slice) else item

    def count(self, value: Any) -> int:
        raise self._object("it counts tokens in Python")

    def index(self, *given: Any) -> int:
        raise self._object("it looks for tokens in Python")


class _Whole(type):
    def __call__(cls, *given: Any, **named: Any) -> int:
        if given and isinstance(given[0], BatchSize):
            return given[0]
        if given and isinstance(given[0], BatchNumber):
            return math.trunc(given[0])
        if len(given) == 1 and isinstance(given[0], Tensor):
            number = given[0].item()
            return number if isinstance(number, BatchSize) else builtins.int(number)
        return builtins.int(*given, **named)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, builtins.int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, builtins.int)


class _Int(metaclass=_Whole):
    """What code of the block finds as ``int``."""


class _Broken(type):
    def __call__(cls, *given: Any) -> builtins.float:
        if given and isinstance(given[0], BatchNumber):
            return given[0]
        if given and isinstance(given[0], BatchSize) and given[0].pure and given[0].of_batch:
            return BatchNumber.of(given[0])
        return builtins.float(*given)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, builtins.float)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, builtins.float)

    def __getattr__(cls, name: str) -> Any:
        return getattr(builtins.float, name)


class _Float(metaclass=_Broken):
    """What code of the block finds as ``float``."""


@contextmanager
def marked_lengths(block: nn.Module, own_int: bool = False) -> Iterator[None]:
    """While this lasts, code of ``block``, and what it calls by name, finds others that keep marks.

    These are ``len``, ``int`` and ``float``.
    Code that it finds otherwise gets Python's own, to which a size of the batch is an objection; with ``own_int`` all
    code gets Python's ``int`` and ``float``, as torch takes no others for dtypes.
    """
    own = list({id(space): space for space in spaces(block)}.values())
    kept = {"len": _length} if own_int else {"len": _length, "int": _Int, "float": _Float}
    placed = [(space, name) for space in own for name in kept if name not in space]
    for space, name in placed:
        space[name] = kept[name]
    try:
        yield
    finally:
        for space, name in placed:
            space.pop(name, None)


def _length(value: Any) -> int:
    if isinstance(value, Choices):
        return value.mark(builtins.len(value))
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)


def spaces(block: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of all code that a block's modules define, or that their forwards call by name."""
    for module in block.modules():
        yield from spaces_of(module)
        for function in functions(module.forward):
            yield function.__globals__


def spaces_of(holder: object) -> Iterator[dict[str, Any]]:
    """The global names of the code that an object's classes define."""
    for cls in type(holder).__mro__:
        if cls is nn.Module:
            break
        for value in vars(cls).values():
            if isinstance(value, FunctionType) and value.__module__.split(".")[0] != "torch":
                yield value.__globals__
