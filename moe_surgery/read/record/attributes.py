"""Attributes that a forward writes and never reads, such as an auxiliary loss, or the last choice of experts.

What is the same after every call is no state: the replacement has the attribute with that value. What comes of the
input alone, by operations that can be run again, isn't either: the replacement writes it as the block did. Anything
else that outlives a call is.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.answers import Always, Constant, ShapeOfInput, SizeOfInput, borne_by, sizes_of, structured
from moe_surgery.read.record.batch_size import MARKED, BatchNumber
from moe_surgery.read.record.reach import functions_of, holders

_FINEST = 1 << 12  # the greatest number that a number of tokens may be divided by
_RANK = frozenset(["ndim", "dim", "ndimension"])
_SIZES = ("shape", "size")
PLAIN_VALUES = (bool, int, float, str, type(None))
Attributes = dict[tuple[str, str], Any]


def kept(
    block: nn.Module,
    changed: Attributes,
    constant: Callable[[Tensor], Constant | None],
    shape: tuple[int, ...],
    written_first: frozenset[tuple[str, str]],
    form: tuple[int, ...] = (),
) -> Attributes:
    """Those of the attributes a call wrote that it didn't find there, if they are plain values, tensors or its shape.

    So are dicts, lists and tuples of such values that it made.

    These are the ones that no code of the block reads, and those that it is known to have ``written_first``, as keys
    of a dict must be. What is a ``constant`` is the same after every call; the input's ``shape`` is known in each.
    An object isn't copied for the replacement, which writes to it in every call.
    """
    read = names_read(block) if changed else frozenset()
    modules = {path for path, _ in block.named_modules()}
    tables = {path for path, holder in holders(block) if type(holder) is dict} if changed else set()
    found: Attributes = {}
    for (path, name), value in changed.items():
        if (name in read or path in tables) and (path, name) not in written_first:
            continue
        if (size := size_of(value, shape)) is not None:
            found[path, name] = size
        elif type(value) in PLAIN_VALUES:
            found[path, name] = value if path in modules else Always(value)
        elif isinstance(value, Tensor) and not borne_by(value):
            same = constant(value)
            found[path, name] = value if same is None else same if path in modules else Always(same)
        elif leads := _leads(value, shape, form):
            found[path, name] = ShapeOfInput(leads, plain=type(value) is tuple)
        elif (type(value) in (dict, list, tuple) or borne_by(value)) and _of_values(value):
            found[path, name] = value
    return found


def _of_values(container: Any) -> bool:
    """Whether a container holds tensors and plain values only, however deep they are in it."""
    leaves: list[Any] = []
    structured(container, lambda leaf, _: leaves.append(leaf))
    return all(type(leaf) in PLAIN_VALUES or isinstance(leaf, (Tensor, *MARKED)) for leaf in leaves)


def size_of(value: Any, shape: tuple[int, ...]) -> SizeOfInput | None:
    """Which size of an input of ``shape`` a number is, or a multiple of which; None if it can't be one.

    One with a point may be a part of one too, such as how many tokens there are for each expert.
    """
    if type(value) not in (int, float, *MARKED) or (isinstance(value, MARKED) and not (value.pure and value.of_batch)):
        return None
    plain = float.__float__(value) if isinstance(value, float) else int.__index__(value)
    if not math.isfinite(plain) or plain <= 0:
        return None
    if isinstance(value, float):
        exact = Fraction(plain).limit_denominator(_FINEST)
        if isinstance(value, BatchNumber):
            if value.power < 0 or value.plus:
                return None
            exact = Fraction(value.times).limit_denominator(_FINEST) * int.__index__(value.source)
            plain = float(exact)  # as dividing gives it
        parts = frozenset((name, exact / size) for name, size in sizes_of(shape).items())
        return SizeOfInput(parts, plain, broken=True) if float(exact) == plain else None
    ways = frozenset((name, int(plain) // size) for name, size in sizes_of(shape).items() if plain % size == 0)
    return SizeOfInput(ways, plain) if ways else None


def _leads(value: Any, shape: tuple[int, ...], form: tuple[int, ...]) -> frozenset[str]:
    """Which shapes of an input a tuple is."""
    if not isinstance(value, tuple) or not all(isinstance(size, int) for size in value):
        return frozenset()
    sizes = tuple(map(int.__index__, value))
    known = {"batch": shape, "flat": (torch.Size(shape[:-1]).numel(), shape[-1]), "form": form}
    return frozenset(name for name, those in known.items() if sizes == those)


def names_read(block: nn.Module) -> frozenset[str]:
    """The names of attributes that any code of a block reads, and the texts in it that may be such names."""
    return frozenset().union(*map(_loads, _codes(block)))


def asks_for_dimensions(block: nn.Module) -> bool:
    """Whether code of a block asks a tensor how many dimensions it has, by their number or by ``len`` of its shape."""
    return not _RANK.isdisjoint(names_read(block)) or any(map(_counts_sizes, _codes(block)))


def _codes(block: nn.Module) -> set[CodeType]:
    return {function.__code__ for function in functions_of(block)}


@lru_cache(maxsize=4096)
def _counts_sizes(code: CodeType) -> bool:
    """Whether code has ``len(x.shape)`` or ``len(x.size())``."""
    counted, last = False, ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name == "LOAD_GLOBAL":
            counted, last = instruction.argval == "len", ""
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            last = instruction.argval
        elif name.startswith("CALL") and counted and last in _SIZES:
            return True
        elif not name.startswith(("LOAD_", "PRECALL", "PUSH_NULL")):
            counted = False
    return any(_counts_sizes(constant) for constant in code.co_consts if isinstance(constant, CodeType))


@lru_cache(maxsize=4096)
def _loads(code: CodeType) -> frozenset[str]:
    found = frozenset(
        instruction.argval
        for instruction in dis.get_instructions(code)
        if not instruction.opname.startswith("STORE") and isinstance(instruction.argval, str)
    )
    return found.union(*(_loads(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


def made(value: Any, device: torch.device, native: torch.dtype) -> Any:
    """An attribute's value for a block on ``device`` and in dtype ``native``."""
    if not isinstance(value, Constant):
        return value
    dtype = native if value.dtype == "native" else getattr(torch, value.dtype)
    return torch.full(value.shape, value.value, dtype=dtype, device=device)
