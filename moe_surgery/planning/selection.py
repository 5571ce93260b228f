"""Which sites the caller wants, and what the caller expects to come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_surgery import checks
from moe_surgery.errors import ExpectationError
from moe_surgery.packs.pattern import Pattern

if TYPE_CHECKING:
    from moe_surgery.planning.survey import Surveyed


@dataclass(frozen=True)
class Selection:
    """Which sites the caller wants: globs over paths, and what must come of it."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    expect: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for what is of the wrong type."""
        checks.texts(self.only, "only")
        checks.texts(self.skip, "skip")
        checks.truth(self.strict, "strict")
        if self.expect is not None:
            checks.whole(self.expect, "expect", 0)

    def excuse(self, path: str) -> str | None:
        """Why a site is left out by the caller, if it is."""
        skipped = next((glob for glob in self.skip if Pattern(glob).matches(path)), None)
        if skipped is not None:
            return f"skipped by {skipped}"
        if self.only and not any(Pattern(glob).matches(path) for glob in self.only):
            return f"not among {', '.join(self.only)}"
        return None

    def check(self, sites: Sequence[Surveyed]) -> None:
        """Raises ``ExpectationError`` for a glob that no site fits: it was meant to do something."""
        for glob in (*self.only, *self.skip):
            if not any(Pattern(glob).matches(item.site.path) for item in sites):
                raise ExpectationError(f"no MoE-looking site fits {glob} (** stands for any number of path segments)")
