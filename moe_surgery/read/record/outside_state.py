"""State that a forward keeps outside of tensors: attributes, globals, closure cells and random generators.

A block that counts its calls, or throws Python's dice, does something else next time. One record can't show that, so
what plain Python values it can reach is compared before and after.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from moe_surgery.read.record.arguments import Untouched

_DEPTH = 3
_MANY = 256
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


def watched(block: nn.Module) -> dict[str, Any]:
    """Fingerprints of everything that ``block`` could keep state in, by what to call it."""
    seen: dict[str, Any] = {"Python's random numbers": hash(random.getstate())}
    seen["torch's random numbers"] = torch.get_rng_state().numpy().tobytes()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        seen["numpy's random numbers"] = name, keys.tobytes(), rest
    found: dict[int, FunctionType] = {}
    for path, holder in holders(block):
        for name, value in vars(holder).items():
            if name not in _INTERNAL:
                seen[f"{path}.{name}".lstrip(".")] = id(value) if _has_attributes(value) else _print(value, 0)
    for path, module in block.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen[f"{path}.{name}".lstrip(".")] = None if tensor is None else (id(tensor), str(tensor.dtype))
        for cls in type(module).__mro__:
            if cls is nn.Module:
                break
            for name, value in list(vars(cls).items()):
                if not callable(value) and not name.startswith("__"):
                    seen[f"{cls.__name__}.{name}"] = _print(value, 0)
        for function in functions(module.forward):
            found[id(function)] = function
    for function in found.values():
        for name, value in _reachable(function):
            seen[name] = _print(value, 0)
    return seen


def holders(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """What has attributes in a block, by path: its modules, and the plain objects in their attributes, each once."""
    seen: set[int] = set()
    for path, module in block.named_modules():
        yield path, module
        yield from _objects(path, module, seen, 0)


def _objects(path: str, holder: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(holder).items()):
        if depth < _DEPTH and id(value) not in seen and _has_attributes(value):
            seen.add(id(value))
            inner = f"{path}.{name}".lstrip(".")
            yield inner, value
            yield from _objects(inner, value, seen, depth + 1)


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object whose attributes are its state: no tensor, module, class or function."""
    if type(value) is Untouched or isinstance(value, (torch.Tensor, type, ModuleType)) or callable(value):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


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


def _print(value: Any, depth: int) -> Any:
    """What stands for a value: its content if it is plain or has attributes, else its identity."""
    if type(value) is Untouched:
        return "untouched"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return type(value).__name__, int.__repr__(value) if isinstance(value, int) else repr(value)
    if isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) <= _MANY and depth < _DEPTH:
        keys = [_print(key, depth + 1) for key in value] if isinstance(value, dict) else []
        items = list(value.values()) if isinstance(value, dict) else list(value)
        return type(value).__name__, keys, [_print(item, depth + 1) for item in items]
    if type(value).__module__ == "itertools":
        return repr(value)
    if depth < _DEPTH and _has_attributes(value):
        return id(value), _print(vars(value), depth + 1)
    return id(value)
