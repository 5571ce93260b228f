"""What a proof found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Mutant:
    """A wrong twin of the block and its distance from the reference, in the same metric as the errors.

    ``family`` is the family of probes that shows it best. ``margin`` is the distance over the block's own error in that
    family (over the least error worth telling from zero, where the block is exact).
    """

    name: str
    distance: float
    family: str = "unit"
    margin: float = math.inf


@dataclass(frozen=True)
class Family:
    """A family of probes: its errors and the measured noise of the block's dtype on the same tokens.

    ``build_error`` is None where no new block was judged.
    """

    name: str
    tokens: int
    reading_error: float
    build_error: float | None
    noise: float


@dataclass(frozen=True)
class Verdict:
    """The numbers of one proof. All errors are the worst token's relative L2 distance from the reference.

    ``reading_error`` is old block vs reference, ``build_error`` new block vs reference (None where no new block was
    judged), ``noise`` the measured error of the dtype itself; these three are of the ``unit`` family, and ``families``
    has all of them. ``margin`` is the least margin of all mutants: the nearest mutant's distance over the error of the
    block. ``near_ties`` tokens are those whose choice of experts is within the noise of the router; ``routing_flips``
    of them took the other choice. ``left_out`` probes said nothing in this dtype and were not asked. ``powerless`` says
    that it didn't pass for want of power: no block was found wrong, but these weights let none be proven. ``bound`` is
    how far a right block may be from the reference, on tokens of unit scale. The reference is computed from the
    ``weights``, or put together from the old block's own ``parts``, as it was seen to compute them.
    An error is infinite where a block returned something that isn't finite, or nothing at all.
    """

    passed: bool
    reason: str
    reading_error: float
    build_error: float | None
    noise: float
    margin: float
    mutants: tuple[Mutant, ...]
    tokens: int
    near_ties: int
    routing_flips: int
    families: tuple[Family, ...] = ()
    left_out: int = 0
    powerless: bool = False
    bound: float = 0.0
    reference: Literal["weights", "parts"] = "weights"

    @classmethod
    def of_nothing(
        cls,
        reason: str,
        *,
        new: bool = True,
        tokens: int = 0,
        powerless: bool = True,
        reference: Literal["weights", "parts"] = "weights",
    ) -> Self:
        """The verdict where nothing was compared; ``new`` says whether a new block was to be judged."""
        return cls(
            passed=False,
            reason=reason,
            reading_error=math.inf,
            build_error=math.inf if new else None,
            noise=math.inf,
            margin=0.0,
            mutants=(),
            tokens=tokens,
            near_ties=0,
            routing_flips=0,
            powerless=powerless,
            reference=reference,
        )

    @property
    def nearest_mutant(self) -> Mutant | None:
        """The mutant with the least margin; None if the proof ended before the mutants."""
        return min(self.mutants, key=lambda mutant: mutant.margin, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; a number that isn't finite is null."""
        return {key: _finite(value) for key, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
