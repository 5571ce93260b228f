"""State that a forward keeps outside of tensors: attributes, globals, closure cells and random generators.

A block that counts its calls, or throws Python's dice, does something else next time. One record can't show that, so
what plain Python values it can reach is compared before and after.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from moe_surgery.read.record.contents import (
    Contents,
    has_attributes,
    held_by,
    held_by_name,
    is_table,
    print_but_attributes,
    print_of,
)

_DEPTH = 3
_FOLLOWED = 8  # functions that call one another, one after another
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_KNOWN = frozenset(["torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names])
_NOT_RUN = frozenset(["__init__", "__post_init__", "__repr__", "__eq__", "__hash__", "extra_repr"])


def watched(block: nn.Module) -> dict[str, Any]:
    """Fingerprints of everything that ``block`` could keep state in, by what to call it."""
    seen: dict[str, Any] = {"Python's random numbers": hash(random.getstate())}
    seen["torch's random numbers"] = torch.get_rng_state().numpy().tobytes()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        seen["numpy's random numbers"] = name, keys.tobytes(), rest
    held = dict(holders(block))
    told = {id(holder) for holder in held.values()}  # whose attributes are looked at one by one
    for path, holder in held.items():
        for name, value in held_by_name(holder).items():
            if name not in _INTERNAL:
                found = print_but_attributes(value, told) if id(value) in told else print_of(value, told)
                seen[f"{path}.{name}".lstrip(".")] = found
    for path, module in block.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen[f"{path}.{name}".lstrip(".")] = None if tensor is None else (id(tensor), str(tensor.dtype))
    for place in places(block):
        seen[place.name] = print_of(place.value, told)
    return seen


@dataclass(frozen=True, eq=False)
class Place:
    """Where code finds something outside of its block: ``owner`` has it as ``attribute``."""

    name: str
    value: Any
    owner: Any
    attribute: str


def places(block: nn.Module) -> Iterator[Place]:
    """What the code of a block and of the objects in it finds in classes, in globals, and in what these lead to."""
    found: set[int] = set()
    classes: set[type] = set()
    for _, holder in holders(block):
        for cls in type(holder).__mro__:
            if cls in classes or _known(cls.__module__):
                continue
            classes.add(cls)
            yield from _in_class(cls)
            for name, value in list(vars(cls).items()):
                if name not in _NOT_RUN:
                    yield from _places_of(value, found, 0)
        yield from _places_of(held_by_name(holder).get("forward"), found, 0)


def _in_class(cls: type) -> Iterator[Place]:
    for name, value in list(vars(cls).items()):
        if not callable(value) and not name.startswith("__"):
            yield Place(f"{cls.__name__}.{name}", value, cls, name)


def _places_of(value: Any, found: set[int], depth: int) -> Iterator[Place]:
    """What a function, and those that it finds by name, find outside of themselves."""
    value = _function(value)
    if value is None or id(value) in found or depth > _FOLLOWED:
        return
    found.add(id(value))
    for name, held in held_by(value):
        yield Place(f"{value.__qualname__}'s {name}", held, None, "")
        yield from _places_of(held, found, depth + 1)
    names = frozenset(code_names(value.__code__))
    for place in _named(value, names):
        yield place
        yield from _places_of(place.value, found, depth + 1)


def _named(function: FunctionType, names: frozenset[str]) -> Iterator[Place]:
    """The globals that a function's code names, and the attributes that it names of classes and modules among them."""
    space = function.__globals__
    for name in sorted(names & space.keys()):
        value = space[name]
        yield Place(f"{function.__module__}.{name}", value, space, name)
        if not isinstance(value, (type, ModuleType)):
            continue
        if _known(value.__module__ if isinstance(value, type) else value.__name__):
            continue
        if isinstance(value, type):
            yield from _in_class(value)
        for inner in sorted(names & vars(value).keys()):
            yield Place(f"{value.__name__}.{inner}", vars(value)[inner], value, inner)


def _function(value: Any) -> FunctionType | None:
    """A callable's Python function, unless it is that of a library that computes nothing else next time."""
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


def _known(module: str) -> bool:
    """Whether a module is known to keep nothing that what blocks compute depends on."""
    if module.startswith("transformers.models."):  # where blocks are
        return False
    return module.split(".")[0] in _KNOWN or module.startswith("moe_surgery.read.")


def code_names(code: CodeType) -> Iterator[str]:
    """The names in a function's code and in that of functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_names(constant)


class Outside:
    """What a block could keep state in beside attributes of its modules, as it is, to be put back."""

    def __init__(self, block: nn.Module) -> None:
        self._places = list(places(block))
        held = [
            value for _, one in holders(block) for name, value in held_by_name(one).items() if name not in _INTERNAL
        ]
        self._contents = Contents([*held, *(place.value for place in self._places)])

    def undo(self) -> None:
        self._contents.undo()
        for place in self._places:
            if isinstance(place.owner, dict):
                place.owner[place.attribute] = place.value
            elif place.owner is not None and vars(place.owner).get(place.attribute) is not place.value:
                setattr(place.owner, place.attribute, place.value)


def holders(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """What has attributes in a block, by path: its modules, and the plain objects in their attributes, each once.

    So have dicts, whose keys are as good as names.
    """
    seen: set[int] = set()
    for path, module in block.named_modules():
        yield path, module
        yield from _objects(path, module, seen, 0)


def _objects(path: str, holder: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(held_by_name(holder).items()):
        if name in _INTERNAL or depth >= _DEPTH or id(value) in seen or "." in name:
            continue
        if has_attributes(value) or is_table(value):
            seen.add(id(value))
            inner = f"{path}.{name}".lstrip(".")
            yield inner, value
            yield from _objects(inner, value, seen, depth + 1)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, by name."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def functions(value: Any, depth: int = 0) -> Iterator[FunctionType]:
    """A callable's Python function, and those of its own code that it calls by a global name or a closure cell."""
    while isinstance(value, (functools.partial, MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    if not isinstance(value, FunctionType) or depth > _DEPTH or value.__module__.split(".")[0] == "torch":
        return
    yield value
    for _, other in _reachable(value):
        if isinstance(other, (FunctionType, MethodType, functools.partial)):
            yield from functions(other, depth + 1)


def _reachable(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and closure cells that a function's code names."""
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f"{function.__module__}.{name}", function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"{function.__qualname__}'s {name}", cell.cell_contents
        except ValueError:
            continue


def scripted(block: nn.Module) -> str | None:
    """What of a block's code is TorchScript, whose control flow leaves no trace in a record."""
    for path, module in block.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return path or "the block"
        for function in functions(module.forward):
            for name, value in _reachable(function):
                if isinstance(value, torch.jit.ScriptFunction):
                    return name
    return None
