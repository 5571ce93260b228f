"""Whether two blocks must compute the same: then one of them is read, and the other needs no reading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.read.reading import Reading, Unreadable
from moe_surgery.read.record.reach import functions

_INTERNAL = frozenset(vars(nn.Module()))
_NOT_RUN = frozenset(["__init__", "extra_repr", "load_weights", "weight_loader"])
_PLAIN = (bool, int, str, torch.dtype, torch.device, type)
_DEPTH = 4
# Code with one of these may look at attributes that it doesn't name.
_BLIND = frozenset(["getattr", "vars", "__dict__", "__getattribute__", "dir"])


class Readings:
    """What was read of blocks so far, by their structure. Holds as long as the blocks live and nobody changes them."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Reading | Unreadable] = {}

    def once(self, key: Hashable, read: Callable[[], Reading]) -> Reading:
        """What was read, or is now, of blocks that share ``key``. Raises :class:`Unreadable` as ``read`` did."""
        if key not in self._known:
            try:
                self._known[key] = read()
            except Unreadable as error:
                # A new one, as the frames and causes of this one would keep the block alive.
                self._known[key] = type(error)(str(error))
        found = self._known[key]
        if isinstance(found, Unreadable):
            raise type(found)(str(found))
        return found


def structure(block: nn.Module, place: str, known: Mapping[nn.Module, Hashable] | None = None) -> Hashable:
    """A key that two blocks share only if their forwards do the same to tensors that differ only in their elements.

    It holds the class and attributes of every submodule, and shape, strides, dtype and device of every
    tensor. A function, such as a forward patched onto an instance, counts by its code and what it closes over; what is
    of no known kind counts by its identity. Plain attributes that no code of the block names, such as a layer's number,
    are left out. ``place`` is the block's path in the model, and stands for itself at the beginning of texts. ``known``
    says of some submodules all that there is to say.
    """
    modules = dict(block.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    told = known or {}
    looked = [module for module in modules.values() if module not in told]
    named = frozenset(name for module in looked for name in _named(module))
    return tuple(
        (path, told[module] if module in told else _Module(place, paths, named, module).key())
        for path, module in block.named_modules(remove_duplicate=False)
    )


@dataclass(frozen=True)
class _Module:
    """One submodule of a block at ``place``.

    ``paths`` are the block's modules by identity, ``named`` the names that occur in its code.
    """

    place: str
    paths: Mapping[int, str]
    named: frozenset[str]
    module: nn.Module

    def key(self) -> Hashable:
        attributes = tuple(
            (name, self._attribute(name, value))
            for name, value in sorted(vars(self.module).items())
            if not self._unseen(name, value)
        )
        return type(self.module), attributes

    def _unseen(self, name: str, value: Any) -> bool:
        plain = value is None or isinstance(value, (bool, int, float, str))
        return plain and name not in _INTERNAL and name not in self.named and not self.named & _BLIND

    def _attribute(self, name: str, value: Any) -> Hashable:
        if name in ("_parameters", "_buffers"):
            return tuple((key, _tensor(tensor)) for key, tensor in value.items())
        if name == "_modules":
            return tuple(value.keys())
        if name in _INTERNAL and isinstance(value, (dict, set)):
            return "internal", len(value)  # hooks and the like, which no site may have
        if isinstance(value, str) and name not in self.named and self.place and value.startswith(self.place):
            return "own name", value[len(self.place) :]
        return self._value(value, 0)

    def _value(self, value: Any, depth: int) -> Hashable:
        if value is None:
            return ("none",)
        if isinstance(value, _PLAIN):
            return type(value).__name__, value
        if isinstance(value, float):
            return "float", repr(value)  # a NaN is equal to itself here
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return "module", self.paths[id(value)]
        if depth < _DEPTH:
            if isinstance(value, (tuple, list)):
                return type(value).__name__, tuple(self._value(item, depth + 1) for item in value)
            if type(value) is dict:
                return "dict", self._value(tuple(value.items()), depth)
            if isinstance(value, MethodType):
                return "method", self._value(value.__self__, depth + 1), self._value(value.__func__, depth + 1)
            if isinstance(value, functools.partial):
                given = (value.func, value.args, tuple(value.keywords.items()))
                return "partial", self._value(given, depth + 1)
            if isinstance(value, FunctionType):
                return self._function(value, depth)
        return "object", id(value)

    def _function(self, function: FunctionType, depth: int) -> Hashable:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self._value(cell.cell_contents, depth + 1))
            except ValueError:  # still empty
                cells.append(("empty",))
        defaults = self._value((function.__defaults__ or (), *(function.__kwdefaults__ or {}).items()), depth + 1)
        return "function", function.__code__, id(function.__globals__), defaults, tuple(cells)


def _tensor(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _named(module: nn.Module) -> Iterator[str]:
    """The names, and the texts that may be names, in all code that a module's forward may run."""
    yield from _named_by(type(module))  # type: ignore[arg-type]
    for value in vars(module).values():
        for function in functions(value):
            yield from words(function.__code__)


@functools.cache
def _named_by(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for cls in kind.__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            function = getattr(value, "fget", value)
            if name not in _NOT_RUN and isinstance(function, FunctionType):
                for other in (function, *functions(function)):
                    found.update(words(other.__code__))
    return frozenset(found)


def words(code: CodeType) -> Iterator[str]:
    """The names in code, and the texts that may be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from words(constant)
