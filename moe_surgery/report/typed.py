"""Values from a file held against the types that their dataclasses declare, before anything relies on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(value: Any, kind: type) -> None:
    """Raise :class:`TypeError`, naming the field, if a dataclass ``kind`` holds, or further in, what it isn't for."""
    for where, found in _wrong(value, kind, ""):
        raise TypeError(f"{where} can't be {found!r}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _wrong(value: Any, wanted: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Where something in ``value`` isn't of its type, and what is there."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, wanted):
            yield where, value
            return
        hints = _hints(wanted)
        for field in fields(wanted):
            yield from _wrong(getattr(value, field.name), hints[field.name], f"{where}.{field.name}".lstrip("."))
    elif origin in (Union, UnionType):
        ways = [list(_wrong(value, way, where)) for way in inner]
        if all(ways):
            # What is wrong further in says more than that the whole is.
            yield max((way[0] for way in ways), key=lambda found: len(found[0]))
    elif origin is Literal:
        if value not in inner:
            yield where, value
    elif origin is tuple:
        if not isinstance(value, tuple) or (inner[-1] is not Ellipsis and len(inner) != len(value)):
            yield where, value
            return
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        for number, (each, kind) in enumerate(zip(value, kinds, strict=True)):
            yield from _wrong(each, kind, f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield where, value
            return
        for key, each in value.items():
            yield from _wrong(key, inner[0], where)
            yield from _wrong(each, inner[1], f"{where}[{key!r}]")
    elif wanted is not Any and not _plain(value, NoneType if wanted is None else wanted):
        yield where, value


def _plain(value: Any, wanted: type) -> bool:
    """A number may stand where a float is wanted, but a truth is no number."""
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
