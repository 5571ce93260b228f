"""Words and numbers as reports print them, and how they are written where the terminal can't show every character."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = str.maketrans(
    {
        "×": "x",
        "±": "+/-",
        "→": "->",
        "·": "|",
        "…": "...",
        "✓": "+",
        "✗": "-",
        "≠": "!=",
        "≥": ">=",
        "≤": "<=",
        "−": "-",
        "–": "-",
        "∞": "inf",
        "’": "'",
        "├": "|",
        "└": "`",
        "│": "|",
        "─": "-",
    }
)
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# What turns the order of the characters after it around.
_CONTROLS |= {code: f"\\u{code:04x}" for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """``text`` without characters that a terminal obeys: names come from other people's files."""
    return text.translate(_CONTROLS)


def writable(text: str, console: Console) -> str:
    """``text`` in the characters that ``console``'s encoding has; the others are replaced, never an error."""
    encoding, text = console.encoding, visible(text)
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
    return text


def size(count: int) -> str:
    """Bytes in binary units: ``0 B``, ``512 B``, ``1.5 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def error(value: float) -> str:
    """A relative error: ``3.1e-3``, ``0`` if it is exactly that, ``∞`` if an output was not finite."""
    if value == 0:
        return "0"
    return "∞" if math.isinf(value) else _short(f"{value:.1e}")


def ratio(value: float) -> str:
    """A factor: ``6.8×``, ``120×``, ``9.3e4×``."""
    if math.isinf(value):
        return "∞×"
    if value < 10:
        return f"{value:.1f}×"
    return f"{value:.0f}×" if value < 1000 else _short(f"{value:.1e}") + "×"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12.3 s``, ``3 min 20 s``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def estimate(seconds: float) -> str:
    """A duration that isn't known to a tenth of a second: ``1 s``, ``12 s``, ``3 min 20 s``."""
    return f"{max(round(seconds), 1)} s" if seconds < 100 else duration(seconds)


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _short(number: str) -> str:
    mantissa, exponent = number.split("e")
    return f"{mantissa}e{int(exponent)}"
