"""What code can get hold of from an object: by attributes, containers, closures, bound methods and weak references.

A reference that is found may be used at any time; one that isn't found is either made by a call or lies in C.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_LEAVES = (bool, int, float, complex, str, bytes, type, ModuleType, CodeType, FrameType, type(None))
# Libraries whose objects hold no weights of a model, and whose functions' globals are their own.
_STRANGERS = frozenset(
    "torch numpy transformers tokenizers logging threading _thread re inspect typing enum asyncio rich".split(" ")
)


def reachable(roots: Iterable[Any], seen: set[int]) -> Iterator[Tensor | nn.Module]:
    """Every tensor and module that ``roots`` lead to; the way ends at each, what lies behind a module isn't looked at.

    ``seen`` holds identities of objects that need no second look, and grows.
    """
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Tensor, nn.Module)):
            yield value
            continue
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        waiting.extend(_next(value))


def _next(value: Any) -> Iterable[Any]:
    """What one step leads to."""
    if isinstance(value, (weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType)):
        alive = value() if isinstance(value, weakref.ReferenceType) else gc.get_referents(value)
        return alive if isinstance(alive, list) else [alive]
    if isinstance(value, FunctionType):
        return [*closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), vars(value)]
    if isinstance(value, (dict, list, tuple, set, frozenset, MethodType, BuiltinFunctionType, functools.partial)):
        return gc.get_referents(value) if not isinstance(value, BuiltinFunctionType) else [value.__self__]
    return () if type(value).__module__.split(".")[0] in _STRANGERS else gc.get_referents(value)


def closed_over(function: FunctionType) -> Iterator[Any]:
    """The values of the closure cells and of the globals that a function's code names.

    Globals of functions of well-known libraries are left out.
    """
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # still empty
            continue
    if function.__module__ is None or function.__module__.split(".")[0] in _STRANGERS:
        return
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def holds_weights(value: Any) -> bool:
    """Whether ``value`` leads to a tensor or to a module that has any."""
    return any(isinstance(found, Tensor) or has_weights(found) for found in reachable([value], set()))


def has_weights(module: nn.Module) -> bool:
    """Whether a module has a parameter or buffer."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
