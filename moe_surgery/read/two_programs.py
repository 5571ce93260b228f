"""The programs of two records held against each other: which of their numbers come of the batch.

A number that happens to be a size of one batch isn't one of another. What is the same in both stays as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from moe_surgery.read.record.batch_size import MOST_ADDED
from moe_surgery.replay import ENTERING, ROUTING, At, Many, Program

_EXACTLY = 1e-13  # some roundings of Python's floats
Shape = tuple[int, ...]


def of_both(first: Program, second: Program, one: Shape, other: Shape) -> Program | None:
    """The program of two records of the same code, of batches of shapes ``one`` and ``other``; None if it isn't one.

    A number that is the same in both is no size of a batch, even if it happened to be one of one of them. A float that
    is the same multiple of a size of both, or the same number divided by one, is that of any batch; no routing and no
    output may come of such.
    """
    if len(first.steps) != len(second.steps):
        return None
    found = _settled(first, second, one, other)
    if found != _settled(second, first, other, one):
        return None
    ends = [number for name, number in found.outputs if name in (*ROUTING, ENTERING)]
    ends += [] if found.whole is None else [found.whole]
    scaled = any(isinstance(leaf, Many) and type(leaf.times) is float for leaf in _operands(found, ends))
    return None if scaled else found


def _operands(program: Program, ends: list[int]) -> Iterator[Any]:
    """The operands of all steps that the results of some steps come of."""
    seen, waiting = set[int](), list(ends)
    while waiting:
        number = waiting.pop()
        if number not in seen:
            seen.add(number)
            leaves = tree_leaves((program.steps[number].args, program.steps[number].kwargs))
            waiting += [leaf.number for leaf in leaves if isinstance(leaf, At)]
            yield from leaves


def _settled(program: Program, other: Program, shape: Shape, others: Shape) -> Program:
    """``program`` with the plain number wherever ``other`` has the same number and says something else of it."""

    def settled(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
            return tuple(map(settled, mine, theirs))
        if type(mine) is type(theirs) is float and mine != theirs:
            return _of_sizes((mine, theirs), shape, others)
        return _was(mine) if mine != theirs and _was(mine) == _was(theirs) else mine

    steps = (
        replace(one, args=settled(one.args, two.args), kwargs=settled(one.kwargs, two.kwargs))
        for one, two in zip(program.steps, other.steps, strict=True)
    )
    return replace(program, steps=tuple(steps))


def _of_sizes(numbers: tuple[float, float], *shapes: Shape) -> float | Many:
    """What a number comes of that is one of ``numbers`` in batches of two ``shapes``; the first if none can be told."""
    named = [{"tokens": torch.Size(shape[:-1]).numel(), "batch": shape[0], "sequence": shape[-2]} for shape in shapes]
    for power, of in itertools.product((1, -1, 2, -2), named[0]):
        times = [number / size[of] ** power for number, size in zip(numbers, named, strict=True)]
        if math.isclose(*times, rel_tol=_EXACTLY):
            return Many(of, float(f"{times[0]:.14g}"), power=power)  # type: ignore[arg-type]
    least = numbers.index(min(numbers))  # of which an epsilon is rounded least
    for of, digits in itertools.product(named[0], (5, 3, 1)):
        many, more = divmod(numbers[least], named[least][of])
        way = Many(of, many, plus=float(f"{more:.{digits}g}"))  # type: ignore[arg-type]
        if way.plus <= MOST_ADDED and numbers == tuple(way.made(sizes[of]) for sizes in named):
            return way
    return numbers[0]


def _was(operand: Any) -> Any:
    """An operand as it stood in its record."""
    return operand.was if isinstance(operand, Many) else operand
