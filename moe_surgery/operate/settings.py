"""How to operate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int, str], None]
"""``(done, total, what)``: sites proven so far, sites in all, and the path being worked on."""


@dataclass(frozen=True)
class Settings:
    """How to operate: ``margin`` the proof asks for, its ``seed``, and whether the originals are kept for undo.

    ``model_check`` says whether the whole model is checked; arguments to call it with may be given instead of True.
    ``expect`` blocks must be replaced in the end, and under ``strict`` all that were planned.
    """

    margin: float = 5.0
    seed: int = 0
    undoable: bool = True
    progress: Progress | None = None
    model_check: bool | Mapping[str, Any] = True
    expect: int | None = None
    strict: bool = False
