"""Commands whose parameters are groups of flags.

typer reads a command's flags from its signature. Here a parameter whose type is a dataclass stands for all its fields:
they become the flags, and the command gets the dataclass back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

from moe_surgery.cli.examples import epilog


class _Plain:
    """Help in which neither a flag without a value nor an argument shows a column for its type."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = parameter.metavar or " "
            if parameter.param_type_name == "argument":  # its own name says what it is
                parameter.display_type_rich = lambda ctx: None
        return found


class Command(_Plain, TyperCommand):
    pass


class Group(_Plain, TyperGroup):
    pass


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command ``name`` of ``app``; its dataclass parameters are groups of flags."""

    def made(function: Callable[..., None]) -> Callable[..., None]:
        last = name.rpartition(" ")[2]
        return app.command(last, cls=Command, epilog=epilog(name), **settings)(grouped(function))

    return made


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
                for info in get_args(inner[field.name]):
                    if isinstance(info, OptionInfo):
                        info.rich_help_panel = group.panel
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
