"""What stands in an object that can change: told apart by content, and put back."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from moe_surgery.read.record.arguments import Untouched

_DEPTH = 8
_MANY = 4096
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, slice)
_CODE = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
_LEAVES = (torch.Tensor, type, ModuleType, CodeType, FrameType)
_NO_STATE = (*_PLAIN, *_LEAVES)
_NO_ATTRIBUTES = (*_LEAVES, *_CODE, nn.Module)
_CONTAINERS = (list, tuple, deque, set, frozenset, dict)
_PLAIN_KINDS = frozenset([*_PLAIN, *_CONTAINERS])
_FIXED = (tuple, frozenset, MethodType)
# Libraries of which no object keeps what a block computes by; loggers cache what they were asked for.
_STRANGERS = frozenset(["logging", "pathlib", "threading", "torch"])


def has_attributes(value: Any) -> bool:
    """Whether a value is an object whose attributes are its state: no tensor, module, class or function."""
    if type(value) in _PLAIN_KINDS or type(value) is Untouched or isinstance(value, _NO_ATTRIBUTES):
        return False
    return not isinstance(value, (int, float)) and isinstance(getattr(value, "__dict__", None), dict)


def is_table(value: Any) -> bool:
    """Whether a value is a dict that code may keep things in by name."""
    return type(value) is dict and all(isinstance(key, str) for key in value)


def held_by_name(holder: Any) -> dict[str, Any]:
    """What a module or object has in its attributes, or a dict under its keys, to be changed in place."""
    return holder if type(holder) is dict else vars(holder)


def print_of(value: Any, told: Set[int], around: tuple[int, ...] = ()) -> Any:
    """What stands for a value: its content if it is plain or can change, else its identity.

    The content of objects whose identities are ``told`` is told elsewhere.
    """
    if type(value) is Untouched:
        return "untouched"
    if isinstance(value, _PLAIN):
        marked = int if isinstance(value, int) else float if isinstance(value, float) else None
        return type(value).__name__, repr(value) if marked is None else marked.__repr__(value)
    if isinstance(value, _LEAVES) or len(around) > _DEPTH or id(value) in told or id(value) in around:
        return id(value)
    identity = 0 if type(value) in _CONTAINERS else id(value)
    items = list(_items(value))
    if len(items) > _MANY:
        return type(value).__name__, identity, hash(tuple(id(part) for item in items for part in item))
    inner = (*around, id(value))
    return type(value).__name__, identity, [[print_of(part, told, inner) for part in item] for item in items]


def print_but_attributes(value: Any, told: Set[int]) -> Any:
    """What stands for an object whose attributes are told one by one."""
    items = _items(value, attributes=False) if not isinstance(value, nn.Module) and not is_table(value) else ()
    return id(value), [[print_of(part, told) for part in item] for item in items]


def _items(value: Any, *, attributes: bool = True) -> Iterator[tuple[Any, ...]]:
    """What stands in a value, part by part."""
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, _CONTAINERS):
        yield from [(item,) for item in value]
    elif isinstance(value, FunctionType):
        yield from held_by(value) if not _strange(value) else ()
    elif isinstance(value, MethodType):
        yield (value.__self__,)
    elif isinstance(value, functools.partial):
        yield value.func, value.args, value.keywords
    elif isinstance(value, GeneratorType) and value.gi_frame is not None:
        yield value.gi_frame.f_lasti, dict(value.gi_frame.f_locals)
    if type(value) in _CONTAINERS:
        return
    if isinstance(value, nn.Module):
        yield from [(name, held) for name, held in vars(value).items() if name not in _INTERNAL]
    elif not isinstance(value, _CODE) and not _strange(type(value)):
        if attributes:
            yield from _attributes(value).items()
        else:
            yield from [(name, getattr(value, name, None)) for name in _slots(value)]
        yield from _told(value)


def _strange(what: FunctionType | type) -> bool:
    return (what.__module__ or "").split(".")[0] in _STRANGERS


def held_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function keeps from call to call: its closure's cells, its defaults and its attributes."""
    yield from zip(function.__code__.co_freevars, (content for _, content in _cells(function)), strict=False)
    yield "defaults", function.__defaults__
    yield "keyword defaults", function.__kwdefaults__
    yield "attributes", vars(function)


def _cells(function: FunctionType) -> Iterator[tuple[Any, Any]]:
    for cell in function.__closure__ or ():
        content = None
        with suppress(ValueError):  # still empty
            content = cell.cell_contents
        yield cell, content


def _slots(value: Any) -> list[str]:
    found: list[str] = []
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its dict or in slots."""
    own = getattr(value, "__dict__", None)
    found = dict(own) if isinstance(own, dict) else {}
    for name in _slots(value):
        with suppress(AttributeError):
            found[name] = getattr(value, name)
    return found


def _told(value: Any) -> Iterator[tuple[Any]]:
    """What an object written in C says of its state: arrays, iterators and generators of random numbers."""
    kind = type(value)
    with suppress(Exception):  # whatever one raises that can't tell
        if _is_buffer(value):
            yield (bytes(memoryview(value).cast("B")),)
        elif hasattr(kind, "tobytes"):
            yield (value.tobytes(),)
        elif hasattr(kind, "bit_generator"):
            yield (repr(value.bit_generator.state),)
        elif hasattr(kind, "getstate"):
            yield (value.getstate(),)
        elif hasattr(kind, "__next__") and kind is not GeneratorType:
            yield (value.__reduce__()[1:],)


class Contents:
    """What stands in the containers and objects that ``values`` lead to, to be put back."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._then: list[tuple[Any, list[tuple[Any, ...]], list[tuple[Any, ...]]]] = []
        seen: set[int] = set()
        waiting = deque((value, 0) for value in values)
        while waiting:  # what is nearest first, as nothing is looked at twice
            value, depth = waiting.popleft()
            if type(value) is Untouched or isinstance(value, _NO_STATE):
                continue
            if id(value) in seen or depth > _DEPTH:
                continue
            seen.add(id(value))
            items = list(_items(value))
            self._then.append((value, _held(value), items))
            waiting.extend((part, depth + 1) for item in items for part in item)

    def intact(self) -> bool:
        """Whether the very same stands everywhere. What tells its state by new objects each time counts as changed."""
        for value, _, then in self._then:
            if type(value) not in _FIXED:
                now = list(_items(value))
                if len(now) != len(then) or not all(map(_same, now, then)):
                    return False
        return True

    def undo(self) -> None:
        """Put back what stood there, wherever something else does now."""
        for value, then, _ in self._then:
            now = _held(value)
            if len(now) != len(then) or not all(map(_same, now, then)):
                _fill(value, then)


def _held(value: Any) -> list[tuple[Any, ...]]:
    """What stands in a value, as far as it can be put back."""
    if isinstance(value, dict):
        return list(dict.items(value))
    if isinstance(value, (list, deque, set)):
        return [(item,) for item in value]
    if isinstance(value, FunctionType):
        return [(cell, content) for cell, content in _cells(value)]
    if _is_buffer(value):
        return [(bytes(memoryview(value).cast("B")),)]
    return list(_attributes(value).items()) if has_attributes(value) or _slots(value) else []


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) is bytes and a == b) for a, b in zip(one, other, strict=True)
    )


def _fill(value: Any, then: list[tuple[Any, ...]]) -> None:
    if isinstance(value, dict):
        value.clear()
        for key, item in then:
            dict.__setitem__(value, key, item)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(item for (item,) in then)
    elif isinstance(value, set):
        value.clear()
        value.update(item for (item,) in then)
    elif isinstance(value, FunctionType):
        for cell, content in then:
            cell.cell_contents = content
    elif _is_buffer(value):
        memoryview(value).cast("B")[:] = then[0][0]
    else:
        was = dict(then)
        for name in _attributes(value).keys() - was.keys():
            object.__delattr__(value, name)
        for name, held in was.items():
            object.__setattr__(value, name, held)


def _is_buffer(value: Any) -> bool:
    """Whether a value is an array of bytes that lie side by side and can be written to."""
    try:
        with memoryview(value) as view:
            return view.c_contiguous and not view.readonly and view.nbytes > 0
    except (TypeError, ValueError):
        return False
