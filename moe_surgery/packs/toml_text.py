"""Values as TOML text, on one line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def pairs(table: dict[str, Any]) -> Iterator[str]:
    """``key = value`` for every entry of a table."""
    for key, value in table.items():
        yield f"{name(key)} = {literal(value)}"


def name(key: str) -> str:
    """A key, in quotes where it needs them."""
    return key if key.isascii() and key.replace("-", "_").isidentifier() else literal(key)


def literal(value: Any) -> str:
    """A boolean, number, string, list or table."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(pairs(value)) + " }"
    return str(value)
