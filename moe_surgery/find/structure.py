"""Whether two blocks must compute the same: then one of them is read, and the other needs no reading."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module()))
_NOT_RUN = frozenset(["__init__", "extra_repr", "load_weights", "weight_loader"])
_PLAIN = (bool, int, str, torch.dtype, torch.device, type)
_DEPTH = 4


def structure(block: nn.Module, place: str, known: Mapping[nn.Module, Hashable] | None = None) -> Hashable:
    """A key that two blocks share only if their forwards do the same to tensors that differ only in their elements.

    It holds the class, forward and attributes of every submodule, and shape, strides, dtype and device of every
    tensor. A function, such as a forward patched onto an instance, counts by its code and what it closes over; what is
    of no known kind counts by its identity. ``place`` is the block's path in the model: a name that begins with it is
    taken for its own name, unless code of the module that has it looks at it. ``known`` says of some submodules all
    that there is to say. Keys may be compared as long as the blocks live.
    """
    paths = {id(module): path for path, module in block.named_modules()}
    return tuple(
        (path, (known or {}).get(module) or _Module(place, paths, module).key())
        for path, module in block.named_modules(remove_duplicate=False)
    )


@dataclass(frozen=True)
class _Module:
    """One submodule of a block at ``place``; ``paths`` are the block's modules by identity."""

    place: str
    paths: Mapping[int, str]
    module: nn.Module

    def key(self) -> Hashable:
        named = frozenset(_named(self.module))
        attributes = tuple(
            (name, self._attribute(name, value, named)) for name, value in sorted(vars(self.module).items())
        )
        return type(self.module), type(self.module).forward, attributes

    def _attribute(self, name: str, value: Any, named: frozenset[str]) -> Hashable:
        if name in ("_parameters", "_buffers"):
            return tuple((key, _tensor(tensor)) for key, tensor in value.items())
        if name == "_modules":
            return tuple(value)
        if name in _INTERNAL and isinstance(value, (dict, set)):
            return "internal", len(value)  # hooks and the like, which no site may have
        if isinstance(value, str) and name not in named and self.place and value.startswith(self.place):
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
    """The names, and the texts that may be names, in all code of a module that a forward may run."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            function = getattr(value, "fget", value)
            if isinstance(function, FunctionType) and name not in _NOT_RUN:
                yield from _words(function.__code__)
    for value in vars(module).values():
        function = value.__func__ if isinstance(value, MethodType) else value
        if isinstance(function, FunctionType):
            yield from _words(function.__code__)


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)
