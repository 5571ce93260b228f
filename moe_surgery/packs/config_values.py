"""Values read from a checkpoint's config, never from a class's defaults on the quiet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moe_surgery.errors import UsageError

ROOT = "."
_PATH = re.compile(r"\w+(\.\w+)*")


class KeyPathError(UsageError):
    """A config path or an ``@key`` that is not written as one."""


@dataclass(frozen=True)
class Absent:
    """Why a config holds no value; ``str`` of it is the reason."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def check_path(text: str) -> str:
    """``text`` if it is a dotted config path, or ``.`` for the config itself; else :class:`KeyPathError`."""
    if text == ROOT or _PATH.fullmatch(text):
        return text
    raise KeyPathError(f'"{text}" is no config path; write names with dots between, or "." for the config itself')


def follow(node: object, path: str) -> object | Absent:
    """The value at a dotted path of a config: keys of mappings, attributes of anything else.

    A class default of a config object is an attribute like any other; a mapping of what the checkpoint says is
    therefore the stricter thing to pass.
    """
    if path == ROOT:
        return node
    for name in path.split("."):
        if isinstance(node, Mapping):
            found: object = node.get(name, Absent(""))
        else:
            found = getattr(node, name, Absent(""))
        if isinstance(found, Absent) or (callable(found) and not isinstance(node, Mapping)):
            return Absent(f"config has no key {path}")
        node = found
    return node


@dataclass(frozen=True)
class Key:
    """``@name``: a key of the config, under the rule's base. ``@/name`` starts at the config's root.

    ``@a|b`` names alternatives for what releases call differently: the first that exists is read.
    """

    paths: tuple[str, ...]
    from_root: bool = False

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read ``@…``. Raises :class:`KeyPathError`."""
        body = text.removeprefix("@")
        paths = tuple(path.strip() for path in body.removeprefix("/").split("|"))
        if not text.startswith("@") or not all(_PATH.fullmatch(path) for path in paths):
            raise KeyPathError(f'"{text}" is no config key; write @key, @outer.key, @one|another or @/key_at_the_root')
        return cls(paths, body.startswith("/"))

    def __str__(self) -> str:
        return "@" + ("/" if self.from_root else "") + "|".join(self.paths)


@dataclass(frozen=True, eq=False)
class View:
    """A config as one rule sees it: the root, and the first of the rule's bases that exists."""

    root: object
    base: str | None
    node: object | Absent

    @classmethod
    def of(cls, config: object, bases: tuple[str, ...] = (ROOT,)) -> View:
        """Look at ``config`` (a mapping, a transformers config, or None) from the first of ``bases`` that exists.

        A base that holds None or a plain value counts as absent: it has no keys.
        """
        if config is None:
            return cls(None, None, Absent("there is no config"))
        for base in bases:
            node = follow(config, base)
            if isinstance(node, Mapping) or not isinstance(node, Absent | str | int | float | list | tuple | None):
                return cls(config, base, node)
        return cls(config, None, Absent(f"config has no key {' nor '.join(bases)}"))

    def read(self, key: Key) -> object | Absent:
        """The value of ``key``, or why there is none."""
        node = self.root if key.from_root and self.root is not None else self.node
        if isinstance(node, Absent):
            return node
        for path in key.paths:
            value = follow(node, path)
            if not isinstance(value, Absent):
                return value
        prefix = "" if key.from_root or self.base in (None, ROOT) else f"{self.base}."
        return Absent("config has no key " + " nor ".join(prefix + path for path in key.paths))
