"""Commands whose parameters are groups of flags.

typer reads a command's flags from its signature. Here a parameter whose type is a dataclass stands for all its fields:
they become the flags, and the command gets the dataclass back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with its dataclass parameters laid open as keyword-only parameters, for typer to read."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[Any, tuple[str, ...]]] = {}
    parameters: list[inspect.Parameter] = []
    flags: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            group = hints[name]
            inner = get_type_hints(group, include_extras=True)
            groups[name] = group, tuple(field.name for field in fields(group))
            for field in fields(group):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                flags.append(
                    inspect.Parameter(
                        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=inner[field.name]
                    )
                )
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    def command(**values: Any) -> None:
        for name, (group, names) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in names})
        function(**values)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters + flags)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters + flags}
    return command
