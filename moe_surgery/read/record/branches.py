"""Comparisons of the batch size: what they tell, and how each is answered in a record."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

_MANY = 1 << 62


def tells_sizes_apart(compare: Callable[[Any, Any], bool], number: Any) -> bool:
    """Whether comparing a size, or a difference of sizes, with ``number`` tells more than its sign."""
    if compare in (operator.eq, operator.ne):
        return not -1 < number < 1
    return compare(1, number) != compare(_MANY, number) or compare(-1, number) != compare(-_MANY, number)


def tells_one_apart(compare: Callable[[Any, Any], bool], number: Any) -> bool:
    """Whether comparing a size with ``number`` tells one from more, and nothing else."""
    return not tells_sizes_apart(compare, number) or (
        compare(1, number) != compare(2, number) and compare(2, number) == compare(_MANY, number) and 0 < number <= 2
    )


class Branches:
    """Comparisons of the batch size that a record met. Those in ``turned`` are answered the other way round.

    A block whose branches all do the same may compare as it likes: it is recorded on all of them.
    """

    def __init__(self, turned: frozenset[str] = frozenset()) -> None:
        self.turned, self.met, self.lone = turned, dict[str, None](), False

    def answer(self, compare: Callable[[Any, Any], bool], size: float, number: Any, pure: bool) -> bool:
        found = compare(size, number)
        if pure and tells_one_apart(
            compare, number
        ):  # records of one token, or one row of tokens, show what comes of it
            self.lone = True
            return found
        return self._turned(f"{compare.__name__} {number}", found)

    def between(self, compare: Callable[[Any, Any], bool], one: int, other: int) -> bool:
        """The same of two sizes: rows, columns, their product, or numbers made of them."""
        found = compare(one, other)
        if one == other:  # the same size, or no telling here; in a batch of other sizes they differ
            return found
        if one % other == 0 or other % one == 0:  # rows or columns, and all: alike where there is one of the others
            self.lone = True
            return found
        return self._turned(f"{compare.__name__} another", found)

    def _turned(self, name: str, found: bool) -> bool:
        self.met[name] = None
        return not found if name in self.turned else found
