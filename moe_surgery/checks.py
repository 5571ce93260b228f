"""Arguments of the wrong type or size, refused with one clear error before anything is done with them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from moe_surgery.errors import UsageError

MOST_SEED = 2**63 - 1


def whole(value: object, what: str, least: int, most: int | None = None) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``; else :class:`UsageError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{what} must be a whole number {limits}, not {shown(value)}")
    return value


def seed(value: object) -> int:
    """``value`` if generators take it as a seed."""
    return whole(value, "seed", 0, MOST_SEED)


def margin(value: object) -> float:
    """``value`` if it is a finite number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise UsageError(f"margin must be a finite number of at least 1, not {shown(value)}")
    return float(value)


def truth(value: object, what: str) -> bool:
    """``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{what} must be True or False, not {shown(value)}")
    return value


def texts(value: object, what: str) -> tuple[str, ...]:
    """``value`` as a tuple if it is a list of strings; one string isn't, though Python takes its letters for one."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{what} must be a list of strings, not {shown(value)}")
    found = tuple(value)
    for item in found:
        if not isinstance(item, str):
            raise UsageError(f"{what} must be a list of strings, and {shown(item)} is none")
    return found


def one_of(value: object, what: str, known: tuple[str, ...]) -> None:
    """Raise :class:`UsageError` if ``value`` isn't among ``known``."""
    if value not in known:
        raise UsageError(f"{what} must be one of {', '.join(known)}, not {shown(value)}")


def path(value: object, what: str) -> Path:
    """``value`` as a path, if it is one."""
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{what} must be a path, not {shown(value)}")
    return Path(value)


def shown(value: object) -> str:
    """``value`` as an error tells it, in one line of bearable length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # numbers of too many digits, and strangers' classes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"
