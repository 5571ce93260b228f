"""Attributes that a forward writes and never reads, such as an auxiliary loss, or the last choice of experts.

What is the same after every call is no state: the replacement has the attribute with that value. What comes of the
input alone, by operations that can be run again, isn't either: the replacement writes it as the block did. Anything
else that outlives a call is.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.calling import Always, Constant, ShapeOfInput, structured
from moe_surgery.read.record.contents import held_by_name
from moe_surgery.read.record.outside_state import Outside, functions, holders
from moe_surgery.read.record.tensor_entries import storage

PLAIN_VALUES = (bool, int, float, str, type(None))
_ABSENT = object()
Attributes = dict[tuple[str, str], Any]


_TABLES = ("_parameters", "_buffers", "_modules")


class Written:
    """The attributes of a block's modules and of objects in them before a call, to tell what it wrote, and to undo it.

    Weights and submodules are put back too: code that converts its own router when it is called would leave a weight of
    the record there. So is what stands in containers, and in classes and globals that the code names.
    """

    def __init__(self, block: nn.Module) -> None:
        self._outside = Outside(block)
        self._before = {path: (holder, dict(held_by_name(holder))) for path, holder in holders(block)}
        self._tables = [(vars(m)[name], dict(vars(m)[name])) for m in block.modules() for name in _TABLES]
        self._data = [(tensor, tensor.detach()) for tensor in (*block.parameters(), *block.buffers())]

    def give(self, values: Attributes) -> None:
        """Give attributes, by module and name, other values."""
        for (path, name), value in values.items():
            held_by_name(self._before[path][0])[name] = value

    def changed(self) -> Attributes:
        """What the call wrote, by module and name."""
        found: Attributes = {}
        for path, (holder, before) in self._before.items():
            for name, value in list(held_by_name(holder).items()):
                if before.get(name, _ABSENT) is not value:
                    found[path, name] = value
        return found

    def undo(self) -> None:
        """Put back what was there before the call."""
        self._outside.undo()
        for table, entries in self._tables:
            if [(name, id(value)) for name, value in table.items()] != [(n, id(v)) for n, v in entries.items()]:
                table.clear()
                table.update(entries)
        for tensor, data in self._data:
            if (tensor.dtype, tensor.device, storage(tensor)) != (data.dtype, data.device, storage(data)):
                tensor.data = data
            if tensor.grad_fn is not None and not tensor._is_view():  # it was written to where gradients are followed
                tensor.detach_()
        for holder, before in self._before.values():
            held = held_by_name(holder)
            for name in [name for name in held if name not in before]:
                del held[name]
            held.update({name: value for name, value in before.items() if held.get(name, _ABSENT) is not value})


@contextmanager
def unwritten(*blocks: nn.Module) -> Iterator[None]:
    """Afterwards the blocks have the attributes that they had before."""
    written = [Written(block) for block in blocks]
    try:
        yield
    finally:
        for attributes in written:
            attributes.undo()


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
        if type(value) in PLAIN_VALUES:
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
