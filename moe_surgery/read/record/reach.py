"""What the code of a block can reach beside its tensors: the objects in it, and what its functions find outside.

A block can keep state in any of it, so all of it is compared before and after a call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef

from moe_surgery.read.record.contents import has_attributes, held_by, held_by_name, is_table

_DEPTH = 3
_INTERNAL = frozenset(vars(nn.Module()))
_FOLLOWED = 8  # functions that call one another, one after another
_KNOWN = frozenset(["torch", "numpy", "transformers", "huggingface_hub", "einops", *sys.stdlib_module_names])
_NOT_RUN = frozenset(["__init__", "__post_init__", "__repr__", "__eq__", "__hash__", "extra_repr"])


@dataclass(frozen=True, eq=False)
class Place:
    """Where code finds something outside of its block: ``owner`` has it as ``attribute``."""

    name: str
    value: Any
    owner: Any
    attribute: str


class Reach:
    """What a block's code reaches: ``holders`` of attributes in it, by path, and ``places`` outside.

    Places are in classes, in globals, and in what these lead to.
    """

    def __init__(self, block: nn.Module) -> None:
        self.holders = list(holders(block))
        self._kinds = [(holder, type(holder)) for _, holder in self.holders]
        self._spaces: dict[tuple[int, frozenset[str] | None], tuple[Any, dict[str, Any]]] = {}
        self._found: set[int] = set()
        self.places = list(self._in_code())

    def intact(self) -> bool:
        """Whether the same names still lead to the very same outside, from objects of the same classes."""
        return all(type(holder) is kind for holder, kind in self._kinds) and all(
            identical(_part(owner, names), then) for (_, names), (owner, then) in self._spaces.items()
        )

    def _note(self, owner: Any, names: frozenset[str] | None = None) -> None:
        """Keep what a class, a module or globals have under some ``names``, or under all, for :meth:`intact`."""
        if (key := (id(owner), names)) not in self._spaces:
            self._spaces[key] = owner, _part(owner, names)

    def _in_code(self) -> Iterator[Place]:
        classes: set[type] = set()
        for _, holder in self.holders:
            for cls in type(holder).__mro__:
                if cls in classes or _known(cls.__module__):
                    continue
                classes.add(cls)
                yield from self._in_class(cls)
                for name, value in list(vars(cls).items()):
                    if name not in _NOT_RUN:
                        yield from self._of(value, 0)
            yield from self._of(held_by_name(holder).get("forward"), 0)

    def _in_class(self, cls: type) -> Iterator[Place]:
        self._note(cls)
        for name, value in list(vars(cls).items()):
            if not callable(value) and not name.startswith("__"):
                yield Place(f"{cls.__name__}.{name}", value, cls, name)

    def _of(self, value: Any, depth: int) -> Iterator[Place]:
        """What a function, and those that it finds by name, find outside of themselves."""
        value = _function(value)
        if value is None or id(value) in self._found or depth > _FOLLOWED:
            return
        self._found.add(id(value))
        for name, held in held_by(value):
            yield Place(f"{value.__qualname__}'s {name}", held, None, "")
            yield from self._of(held, depth + 1)
        for place in self._named(value, _code_names(value.__code__)):
            yield place
            yield from self._of(place.value, depth + 1)

    def _named(self, function: FunctionType, names: frozenset[str]) -> Iterator[Place]:
        """The globals that a function's code names, and the attributes that it names of classes and modules there."""
        space = function.__globals__
        self._note(space, names)
        for name in sorted(names & space.keys()):
            value = space[name]
            yield Place(f"{function.__module__}.{name}", value, space, name)
            if not isinstance(value, (type, ModuleType)):
                continue
            if _known(value.__module__ if isinstance(value, type) else value.__name__):
                continue
            if isinstance(value, type):
                yield from self._in_class(value)
            self._note(value, names)
            for inner in sorted(names & vars(value).keys()):
                yield Place(f"{value.__name__}.{inner}", vars(value)[inner], value, inner)


def _part(owner: Any, names: frozenset[str] | None) -> dict[str, Any]:
    space = owner if isinstance(owner, dict) else vars(owner)
    return dict(space) if names is None else {name: space[name] for name in names if name in space}


def identical(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether two mappings of the same kinds of keys hold the very same objects."""
    return len(one) == len(other) and all(name in other and other[name] is value for name, value in one.items())


def _function(value: Any) -> FunctionType | None:
    """A callable's Python function, unless it is that of a library that computes nothing else next time."""
    value = as_written(value) or value
    while not isinstance(value, FunctionType):
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, (MethodType, classmethod, staticmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        else:
            return None
    return None if _known(value.__module__ or "") else value


@functools.cache
def _known(module: str) -> bool:
    """Whether a module is known to keep nothing that what blocks compute depends on."""
    if module.startswith("transformers.models."):  # where blocks are
        return False
    return module.split(".")[0] in _KNOWN or module.startswith("moe_surgery.read.")


@functools.lru_cache(maxsize=4096)
def _code_names(code: CodeType) -> frozenset[str]:
    """The names in a function's code and in that of functions defined in it."""
    inner = (_code_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def holders(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """What has attributes in a block, by path: its modules, and the plain objects in their attributes, each once.

    So have dicts, whose keys are as good as names.
    """
    seen: set[int] = set()
    for path, module in block.named_modules():
        yield path, module
        yield from _objects(path, module, seen, 0)


def _objects(path: str, holder: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if depth == _DEPTH:
        return
    for name, value in list(held_by_name(holder).items()):
        if name in _INTERNAL or "." in name or id(value) in seen:
            continue
        if has_attributes(value) or is_table(value):
            seen.add(id(value))
            inner = f"{path}.{name}".lstrip(".")
            yield inner, value
            yield from _objects(inner, value, seen, depth + 1)


def functions(value: Any, depth: int = 0) -> Iterator[FunctionType]:
    """A callable's Python function, and those of its own code that it calls by a global name or a closure cell."""
    while isinstance(value, (functools.partial, MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    value = as_written(value) or value
    if not isinstance(value, FunctionType) or depth > _DEPTH or value.__module__.split(".")[0] == "torch":
        return
    yield value
    for _, other in reachable(value):
        if isinstance(other, (FunctionType, MethodType, functools.partial, torch.jit.ScriptFunction, CustomOpDef)):
            yield from functions(other, depth + 1)


def functions_of(block: nn.Module) -> Iterator[FunctionType]:
    """The functions that classes of a block's modules and objects define, and all that these and its forwards call."""
    known: set[type] = set()
    for _, holder in holders(block):
        for cls in type(holder).__mro__:
            if cls is nn.Module or cls in known:
                break
            known.add(cls)
            for value in vars(cls).values():
                function = getattr(value, "fget", value)
                if isinstance(function, FunctionType) and function.__name__ != "__init__":
                    yield function
                    yield from functions(function)
        yield from functions(held_by_name(holder).get("forward"))


def as_written(value: Any) -> FunctionType | None:
    """The Python function that a TorchScript function, or an operator, was made of, if it is one and does the same.

    An operator is what it was registered with, unless it has other kernels for some devices, or changes what it is
    given.
    """
    if type(value) is CustomOpDef:
        alone = list(value._backend_fns) == [None] and not value._opoverload._schema.is_mutable
        return value._init_fn if alone and isinstance(value._init_fn, FunctionType) else None
    if not issubclass(type(value), torch.jit.ScriptFunction):  # what isn't one isn't even asked
        return None
    made_of = getattr(value, "_torchdynamo_inline", None)
    return made_of if isinstance(made_of, FunctionType) and "is_scripting" not in made_of.__code__.co_names else None


def reachable(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and closure cells that a function's code names."""
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f"{function.__module__}.{name}", function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"{function.__qualname__}'s {name}", cell.cell_contents
        except ValueError:
            continue
