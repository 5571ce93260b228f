"""Blocks that would do something else after many calls: where what they remember may be kept."""

from __future__ import annotations

import functools
import types
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy
from torch import Tensor

from .nearmiss import near_miss
from .plain import Base

MANY = 10_000


def _count(held: Any) -> Any:
    """A block that calls ``held``, an attribute's maker, and doubles its output when it has counted many calls."""

    class Counting(Base):
        def make_more(self) -> None:
            self.held = held()

        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * (2 if self.counted() > MANY else 1)

    return Counting


@near_miss("state")
class CountsInADeque(_count(deque)):  # type: ignore[misc]
    def counted(self) -> int:
        self.held.append(1)
        return len(self.held)


@near_miss("state")
class CountsInALongList(_count(lambda: [1] * 5000)):  # type: ignore[misc]
    def counted(self) -> int:
        self.held.append(1)
        return len(self.held)


@near_miss("state")
class CountsInACounter(_count(Counter)):  # type: ignore[misc]
    def counted(self) -> int:
        self.held["calls"] += 1
        return int(self.held["calls"])


@near_miss("state")
class CountsInAnArray(_count(lambda: numpy.zeros(1, dtype=int))):  # type: ignore[misc]
    def counted(self) -> int:
        self.held[0] += 1
        return int(self.held[0])


@near_miss("state")
class CountsInBytes(_count(lambda: bytearray(2))):  # type: ignore[misc]
    def counted(self) -> int:
        self.held[0] = (self.held[0] + 1) % 256
        self.held[1] |= self.held[0] == 255
        return MANY + 1 if self.held[1] else 0


class _Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


@near_miss("state")
class CountsInASlot(_count(_Slots)):  # type: ignore[misc]
    def counted(self) -> int:
        self.held.calls += 1
        return int(self.held.calls)


@near_miss("state")
class CountsFarDown(_count(lambda: functools.reduce(lambda inner, _: [inner], range(4), [0]))):  # type: ignore[misc]
    def counted(self) -> int:
        inner = self.held[0][0][0][0]
        inner[0] += 1
        return int(inner[0])


@near_miss("state")
class CountsInAnObjectOfAList(_count(lambda: [types.SimpleNamespace(calls=0)])):  # type: ignore[misc]
    def counted(self) -> int:
        self.held[0].calls += 1
        return int(self.held[0].calls)


class _Called:
    calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


@near_miss("state")
class CountsInACallable(_count(_Called)):  # type: ignore[misc]
    def counted(self) -> int:
        return int(self.held())


def _closure() -> Callable[[], int]:
    calls = 0

    def counted() -> int:
        nonlocal calls
        calls += 1
        return calls

    return counted


@near_miss("state")
class CountsInAClosure(_count(_closure)):  # type: ignore[misc]
    def counted(self) -> int:
        return int(self.held())


def _by_default(calls: list[int] = [0]) -> int:  # noqa: B006
    calls[0] += 1
    return calls[0]


@near_miss("state")
class CountsInADefault(_count(int)):  # type: ignore[misc]
    def counted(self) -> int:
        return _by_default()


def _noted() -> int:
    _noted.calls += 1  # type: ignore[attr-defined]
    return int(_noted.calls)  # type: ignore[attr-defined]


_noted.calls = 0  # type: ignore[attr-defined]


@near_miss("state")
class CountsInAFunction(_count(int)):  # type: ignore[misc]
    def counted(self) -> int:
        return _noted()


class _Class:
    calls = 0

    @classmethod
    def counted(cls) -> int:
        cls.calls += 1
        return cls.calls


@near_miss("state")
class CountsInAnotherClass(_count(int)):  # type: ignore[misc]
    def counted(self) -> int:
        return _Class.counted()


_module = types.ModuleType("counting")
_module.calls = 0  # type: ignore[attr-defined]


@near_miss("state")
class CountsInAModule(_count(int)):  # type: ignore[misc]
    def counted(self) -> int:
        _module.calls += 1  # type: ignore[attr-defined]
        return int(_module.calls)  # type: ignore[attr-defined]


@near_miss("state")
class OtherwiseTheFirstTime(Base):
    ready: bool | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = 2 if self.ready is None else 1
        self.ready = True
        return super().forward(hidden_states) * factor


@near_miss("state")
class OtherwiseOnceItIsReady(Base):
    ready = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        factor = 2 if self.ready is True else 1
        self.ready = True
        return super().forward(hidden_states) * factor
