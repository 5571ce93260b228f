"""Which field of a config stands in the way, looked up once transformers has failed over it without saying so."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

_COUNTS = re.compile(r"^num_|_size$|_dim$|_step$|_heads$|^n_|^d_")
_OBJECTS = re.compile(r"_config$|^auto_map$|^id2label$|^label2id$|^rope_parameters$|^rope_scaling$")
_FIELD = re.compile(r"Field '(\w+)' ")
_EXPECTED = re.compile(r"expected (\w+), got \w+ \(value: (.*?)\)(?:;|$)")
_KINDS = {
    "dict": "an object",
    "PreTrainedConfig": "an object",
    "NoneType": "null",
    "list": "a list",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def fields(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The fields of a config and of the objects inside it, outermost first: ``(path, name, value)``."""
    waiting = deque([("", config)])
    while waiting:
        within, held = waiting.popleft()
        for name, value in held.items():
            yield within + name, name, value
            if isinstance(value, dict):
                waiting.append((f"{within}{name}.", value))


def ill_typed(text: str, config: Mapping[str, Any]) -> str | None:
    """What transformers says in ``text`` of a field of the wrong type, in short and with its path; None of others."""
    named, wanted = _FIELD.match(text), _EXPECTED.findall(text)
    if named is None or not wanted:
        return None
    value = wanted[0][1]
    alike = [(path, name) for path, name, held in fields(config) if repr(held) == value]
    same = [path for path, name in alike if name == named[1]]
    # transformers renames some before it looks at them.
    place = (same or [path for path, name in alike if _OBJECTS.search(name)] or [named[1]])[0]
    kinds = dict.fromkeys(_KINDS.get(kind, kind) for kind, _ in wanted)
    return f"{place}: {' or '.join(kinds)} is wanted, not {value}"


def field_of(config: Mapping[str, Any], wanted: object) -> str | None:
    """The path of the first field whose value is the text ``wanted``."""
    return next((path for path, _, value in fields(config) if isinstance(value, str) and value == wanted), None)


def no_counts(config: Mapping[str, Any], *, zero: bool) -> str:
    """The fields that are zero, or else below, and as counts or sizes can't be, as a hint; or nothing."""
    found = [
        f"{name} is {value}"
        for name, value in sorted(config.items())
        if type(value) is int and (value == 0 if zero else value < 0) and _COUNTS.search(name)
    ]
    return f"{', '.join(found)}: " if found else ""


def no_objects(config: Mapping[str, Any]) -> str:
    """The first field that should be an object and isn't, as a hint; or nothing."""
    for path, name, value in fields(config):
        among = path.rpartition(".")[0]
        in_table = among.rpartition(".")[2] == "rope_parameters" and name.endswith("_attention")
        if (_OBJECTS.search(name) or in_table) and not isinstance(value, dict | None):
            return f"{path}: an object is wanted, not {value!r}: "
    return ""
