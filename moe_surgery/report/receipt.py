"""What one process of a run tells of one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = "moe-surgery/receipt/1"
Outcome = Literal["operated", "kept", "unpatched", "failed", "audited"]


@dataclass(frozen=True)
class Receipt:
    """What was done with one model in one process.

    ``rank`` is the global one among the ``world`` ranks that hold the model together, ``stage`` the part of a pipeline
    that it holds, and ``model`` the architecture or class that was built, as the process's ``load``-th of that class: a
    draft model may be of the class of its target. "kept" is one in which nothing was replaced, "unpatched" one
    that stays as it was although surgery was asked for, "audited" one that was only asked. ``fingerprint`` is the
    plan's, ``ledger`` the digest of where every weight went, ``report`` what ``Report.to_json`` gives; each is None
    where it didn't come to that. ``error`` and ``exit_code`` tell what went wrong.
    """

    pid: int
    rank: int
    world: int
    model: str
    outcome: Outcome
    fingerprint: str | None
    ledger: str | None
    report: dict[str, Any] | None
    error: str | None = None
    exit_code: int = 0
    stage: int = 0
    load: int = 1

    @property
    def name(self) -> str:
        """The model, and which of its class where that needs saying."""
        return self.model if self.load == 1 else f"{self.model}, load {self.load}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data of the versioned schema ``moe-surgery/receipt/1``."""
        return {"schema": SCHEMA, **asdict(self)}
