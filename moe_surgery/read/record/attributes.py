"""Attributes that a forward writes and never reads, such as an auxiliary loss, or the last choice of experts.

What is the same after every call is no state: the replacement has the attribute with that value. What comes of the
input alone, by operations that can be run again, isn't either: the replacement writes it as the block did. Anything
else that outlives a call is.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.calling import Always, Constant, ShapeOfInput, SizeOfInput, sizes_of, structured
from moe_surgery.read.record.reach import functions, holders

PLAIN_VALUES = (bool, int, float, str, type(None))
Attributes = dict[tuple[str, str], Any]


def kept(
    block: nn.Module,
    changed: Attributes,
    constant: Callable[[Tensor], Constant | None],
    shape: tuple[int, ...],
    written_first: frozenset[tuple[str, str]],
) -> Attributes:
    """Those of the attributes a call wrote that it didn't find there, if they are plain values, tensors or its shape.

    So are dicts, lists and tuples of such values that it made.

    These are the ones that no code of the block reads, and those that it is known to have ``written_first``, as keys
    of a dict must be. What is a ``constant`` is the same after every call; the input's ``shape`` is known in each.
    An object isn't copied for the replacement, which writes to it in every call.
    """
    read = frozenset(names_read(block)) if changed else frozenset()
    modules = {path for path, _ in block.named_modules()}
    tables = {path for path, holder in holders(block) if type(holder) is dict} if changed else set()
    found: Attributes = {}
    for (path, name), value in changed.items():
        if (name in read or path in tables) and (path, name) not in written_first:
            continue
        if ways := _ways(value, shape):
            found[path, name] = SizeOfInput(ways, int.__index__(value))
        elif type(value) in PLAIN_VALUES:
            found[path, name] = value if path in modules else Always(value)
        elif isinstance(value, Tensor):
            same = constant(value)
            found[path, name] = value if same is None else same if path in modules else Always(same)
        elif leads := _leads(value, shape):
            found[path, name] = ShapeOfInput(leads)
        elif type(value) in (dict, list, tuple) and _of_values(value):
            found[path, name] = value
    return found


def _of_values(container: Any) -> bool:
    """Whether a container holds tensors and plain values only, however deep they are in it."""
    leaves: list[Any] = []
    structured(container, lambda leaf, _: leaves.append(leaf))
    return all(type(leaf) in PLAIN_VALUES or isinstance(leaf, Tensor) for leaf in leaves)


def _ways(value: Any, shape: tuple[int, ...]) -> frozenset[tuple[str, int]]:
    """Which sizes of an input of ``shape`` a number is, or a multiple of which."""
    if not isinstance(value, int) or isinstance(value, bool) or int.__index__(value) < 1:
        return frozenset()
    sizes, number = sizes_of(shape), int.__index__(value)
    return frozenset((name, number // size) for name, size in sizes.items() if number % size == 0)


def _leads(value: Any, shape: tuple[int, ...]) -> frozenset[str]:
    """Which shapes of an input a tuple is."""
    if not isinstance(value, tuple) or not all(isinstance(size, int) for size in value):
        return frozenset()
    sizes = tuple(map(int.__index__, value))
    known = {"batch": shape, "flat": (torch.Size(shape[:-1]).numel(), shape[-1])}
    return frozenset(name for name, those in known.items() if sizes == those)


def names_read(block: nn.Module) -> Iterator[str]:
    """The names of attributes that any code of a block reads, and the texts in it that may be such names."""
    seen: set[int] = set()
    for _, holder in holders(block):
        for cls in type(holder).__mro__:
            if cls is nn.Module:
                break
            for value in vars(cls).values():
                function = getattr(value, "fget", value)
                if not isinstance(function, FunctionType) or function.__name__ == "__init__":
                    continue
                for other in (function, *functions(function)):
                    if id(other) not in seen:
                        seen.add(id(other))
                        yield from _loads(other.__code__)
        for function in functions(getattr(holder, "forward", None)):
            yield from _loads(function.__code__)


def _loads(code: Any) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if not instruction.opname.startswith("STORE") and isinstance(instruction.argval, str):
            yield instruction.argval
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _loads(constant)


def made(value: Any, device: torch.device, native: torch.dtype) -> Any:
    """An attribute's value for a block on ``device`` and in dtype ``native``."""
    if not isinstance(value, Constant):
        return value
    dtype = native if value.dtype == "native" else getattr(torch, value.dtype)
    return torch.full(value.shape, value.value, dtype=dtype, device=device)
