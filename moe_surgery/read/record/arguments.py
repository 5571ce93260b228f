"""A forward's arguments: which are the block's tensors, which no code of the forward names, which have defaults."""

from __future__ import annotations

import dis
import inspect
from dataclasses import MISSING, replace
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from moe_surgery.calling import Argument, Calling
from moe_surgery.read.reading import Unreadable

_MANY: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_READS_ALL = frozenset(["locals", "vars", "eval", "exec", "inspect", "sys"])
_ROLES: dict[int, tuple[Any, ...]] = {1: ("hidden_states",), 3: ("hidden_states", "ids", "weights")}


def arguments_of(module: nn.Module, inputs: int = 1, *, absent: bool = False) -> Calling:
    """How ``module`` is called with ``inputs`` tensors: the block's input alone, or tokens, ids and weights.

    With ``absent``, whatever else it needs is to be None (token ids, in layers that don't route by them).
    Raises :class:`~moe_surgery.read.reading.Unreadable` if more arguments are needed, or fewer.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = _named(module.forward, len(parameters))
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if named is not None and sum(p.name in named for p in needed) < inputs:
        named = None  # it reads fewer than it is given
    found, roles = [], iter(_ROLES[inputs])
    for parameter in parameters:
        many = _MANY.get(parameter.kind, "")
        default = MISSING if parameter.default is parameter.empty else parameter.default
        role: Any = "fixed" if many or default is not MISSING else "needed"
        required = False
        if named is not None and parameter.name not in named:
            role = "unused"
        gathered = many == "*" and not needed and inputs == 1  # nothing else can be the input
        if gathered:
            role, many = next(roles, None), ""
        if role == "needed":
            role = next(roles, "fixed" if absent else None)
            required = role == "fixed"
            default = None if required else default
        by_name = parameter.kind is parameter.KEYWORD_ONLY
        if role is None or (by_name and default is MISSING):
            raise Unreadable(_not_so(parameters, inputs))
        found.append(Argument(parameter.name, role, many, default, by_name, required, gathered=gathered))
    if next(roles, None) is not None:
        raise Unreadable(_not_so(parameters, inputs))
    return Calling(tuple(found))


def with_one_more(calling: Calling) -> Calling | None:
    """The same arguments and a None behind an input that is gathered with others, as ``*given`` is; else None.

    There are no more than two of these.
    """
    place, found = next((n, a) for n, a in enumerate(calling.arguments) if a.role == "hidden_states")
    number = sum(a.name.startswith(f"{found.name}[") for a in calling.arguments) + 1
    if not found.gathered or number > 2:
        return None
    more = Argument(f"{found.name}[{number}]", "fixed", required=True)
    return replace(
        calling, arguments=(*calling.arguments[: place + number], more, *calling.arguments[place + number :])
    )


def passed_on(calling: Calling) -> list[Argument]:
    """Arguments that may be no more than passed on, by name or by place, and are None if not given."""
    return [a for a in calling.arguments if a.role == "fixed" and not a.many and a.default is None]


def unused(calling: Calling, argument: Argument) -> Calling:
    """The same arguments, of which ``argument`` makes no difference."""
    arguments = tuple(replace(a, role="unused") if a is argument else a for a in calling.arguments)
    return replace(calling, arguments=arguments)


def weights_first(calling: Calling) -> Calling:
    """The same arguments, with routing weights before ids."""
    swapped: dict[Any, Any] = {"ids": "weights", "weights": "ids"}
    return replace(calling, arguments=tuple(replace(a, role=swapped.get(a.role, a.role)) for a in calling.arguments))


def _not_so(parameters: list[inspect.Parameter], inputs: int) -> str:
    wanted = "one tensor" if inputs == 1 else f"{inputs} tensors"
    return f"its forward takes ({', '.join(map(str, parameters))}), not {wanted}"


def _named(forward: Any, count: int) -> frozenset[str] | None:
    """The local names that the code of ``forward`` reads; None if that can't be told."""
    function = forward.__func__ if isinstance(forward, MethodType) else forward
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    if _READS_ALL & set(code.co_names):
        return None
    bound = isinstance(forward, MethodType)
    total = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    if total + bool(code.co_flags & inspect.CO_VARKEYWORDS) - bound != count:
        return None
    read = set(code.co_cellvars)
    for instruction in dis.get_instructions(code):
        if "LOAD" in instruction.opname or "DELETE" in instruction.opname:
            value = instruction.argval
            read.update(map(str, value if isinstance(value, tuple) else (value,)))
    return frozenset(read)


class Untouched:
    """A value for an argument that code may pass on, but not look at; ``touched`` is whether any did."""

    def __init__(self) -> None:
        object.__setattr__(self, "touched", [])

    def __getattribute__(self, name: str) -> Any:
        return _touch(self)


def _touch(value: Untouched, *others: Any) -> Any:
    object.__getattribute__(value, "touched").append(True)
    raise TypeError("it looks at an argument beside its input")


def was_touched(value: Untouched) -> bool:
    return bool(object.__getattribute__(value, "touched"))


for _name in (
    "bool len iter eq ne lt gt le ge getitem contains call hash int float index str repr add radd mul rmul sub rsub "
    "truediv rtruediv floordiv mod and rand or ror invert neg matmul rmatmul pow"
).split():
    setattr(Untouched, f"__{_name}__", _touch)
