"""Whether a rule holds at a site: every clause held against what was read there."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.models.site import Site
from moe_surgery.read.reading import Reading


@dataclass(frozen=True)
class Clue:
    """One clause held against a site: what was wanted, what was measured, and whether it held."""

    clause: str
    held: bool
    wanted: str
    measured: str

    def __str__(self) -> str:
        return f"{'✓' if self.held else '✗'} {self.clause}: wanted {self.wanted}, measured {self.measured}"


@dataclass(frozen=True)
class Match:
    """A rule holds at a site. ``letters`` are the shape letters it bound (E, H, I, S)."""

    site: Site
    reading: Reading
    rule: str
    letters: tuple[tuple[str, int], ...]
    trail: tuple[Clue, ...]


@dataclass(frozen=True)
class Miss:
    """No rule holds at a site, or it could not be read. Falsy; ``reason`` is formatted only when asked for."""

    site: Site
    trail: tuple[Clue, ...]
    unread: str | None = None

    def __bool__(self) -> bool:
        return False

    @property
    def reason(self) -> str:
        if self.unread is not None:
            return self.unread
        return "; ".join(str(clue) for clue in self.trail if not clue.held)
