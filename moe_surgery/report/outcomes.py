"""What happened to a model as values: a step per site, in the order of the model's module tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from moe_surgery.packs.match import Clue
from moe_surgery.prove.verdict import Verdict
from moe_surgery.spec import MoESpec
from moe_surgery.weights.routes import Route

Outcome = Literal["replaced", "kept", "missed", "refused", "right", "wrong", "not comparable"]
"""What became of a site; the last three are those of an audit."""
Done = Literal["scanned", "planned", "verified", "applied", "rolled back", "undone", "audited"]
SCHEMA = "moe-surgery/report/1"


@dataclass(frozen=True)
class Step:
    """What was done, or is to be done, with one site.

    ``path`` is the site's path in the model, ``kind`` its class name, ``reason`` why it ended this way (one sentence,
    for every outcome). ``rule`` and ``target`` are None where none applies; ``verdict`` is None before the proof.
    ``trail`` has the clauses of the nearest rule where none fits, ``weights`` where a matched block's tensors go.
    """

    path: str
    kind: str
    outcome: Outcome
    reason: str
    rule: str | None = None
    target: str | None = None
    spec: MoESpec | None = field(default=None, repr=False)
    verdict: Verdict | None = field(default=None, repr=False)
    trail: tuple[Clue, ...] = field(default=(), compare=False, repr=False)
    weights: tuple[Route, ...] = field(default=(), compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "outcome": self.outcome,
            "reason": self.reason,
            "rule": self.rule,
            "target": self.target,
            "spec": self.spec.to_json() if self.spec else None,
            "proof": self.verdict.to_json() if self.verdict else None,
            **self.trace(),
        }

    def trace(self) -> dict[str, Any]:
        """How it came about, as far as that is known."""
        told = {
            "trail": [asdict(clue) for clue in self.trail],
            "weights": [route.to_json() for route in self.weights],
        }
        return {name: listed for name, listed in told.items() if listed}

    @classmethod
    def from_json(cls, site: Mapping[str, Any], spec: MoESpec | None, verdict: Verdict | None = None) -> Self:
        """The step that :meth:`to_json` told, with its ``spec`` and ``verdict``."""
        trail = tuple(Clue(**clue) for clue in site.get("trail", ()))
        weights = tuple(Route(**route) for route in site.get("weights", ()))
        path, kind, outcome = site["path"], site["kind"], site["outcome"]
        reason, rule, target = site["reason"], site["rule"], site["target"]
        return cls(path, kind, outcome, reason, rule, target, spec, verdict, trail, weights)


@dataclass(frozen=True)
class Memory:
    """Bytes: ``moved`` by reference, ``new`` allocated for the replacements, ``kept`` of the originals for undo."""

    moved: int = 0
    new: int = 0
    kept: int = 0


@dataclass(frozen=True)
class ModelCheck:
    """What the check of the whole model found: that a short run of it did the same before and after.

    ``parts`` are the parts that were run, "" being the whole model, on ``tokens`` tokens in all; ``not_run`` those that
    could not be, with the reason; ``not_called`` the sites that no run came to. ``apart`` is the greatest distance of a
    new block from the old one on the model's own tokens, relative, worst token. ``seconds`` is what it cost.
    """

    parts: tuple[str, ...]
    tokens: int
    not_run: tuple[tuple[str, str], ...]
    not_called: tuple[str, ...]
    apart: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": list(self.parts),
            "tokens": self.tokens,
            "not_run": [{"part": part, "reason": reason} for part, reason in self.not_run],
            "not_called": list(self.not_called),
            "apart": self.apart,
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelCheck:
        not_run = tuple((entry["part"], entry["reason"]) for entry in data["not_run"])
        lists = {key: tuple(data[key]) for key in ("parts", "not_called")}
        return cls(tokens=data["tokens"], not_run=not_run, apart=data["apart"], seconds=data["seconds"], **lists)


@dataclass(frozen=True)
class Outcomes:
    """The outcome of ``plan``, ``verify``, ``apply`` or an audit for a whole model.

    ``done`` is what the steps describe: "scanned" (sites that can be read are kept), "planned" (nothing touched),
    "verified" (proven, model as it was), "applied", "rolled back" (a failure; model as it was), "undone" or "audited"
    (what an engine built was held against its checkpoint). ``model_check`` is None where none was made. ``phases`` are
    the seconds of each part of the work, as far as they were told apart.
    """

    model: str
    done: Done
    steps: tuple[Step, ...]
    fingerprint: str
    versions: dict[str, str]
    seconds: float = 0.0
    memory: Memory = Memory()
    exit_code: int = 0
    model_check: ModelCheck | None = None
    phases: tuple[tuple[str, float], ...] = ()

    def _with(self, outcome: Outcome) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.outcome == outcome)

    @property
    def replaced(self) -> tuple[Step, ...]:
        return self._with("replaced")

    @property
    def kept(self) -> tuple[Step, ...]:
        return self._with("kept")

    @property
    def missed(self) -> tuple[Step, ...]:
        return self._with("missed")

    @property
    def right(self) -> tuple[Step, ...]:
        return self._with("right")

    @property
    def wrong(self) -> tuple[Step, ...]:
        return self._with("wrong")

    @property
    def incomparable(self) -> tuple[Step, ...]:
        return self._with("not comparable")

    @property
    def refused(self) -> tuple[Step, ...]:
        return self._with("refused")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data of the versioned schema ``moe-surgery/report/1``."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "done": self.done,
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
            "sites": [step.to_json() for step in self.steps],
            "memory": {"moved": self.memory.moved, "new": self.memory.new, "kept": self.memory.kept},
            "model_check": self.model_check.to_json() if self.model_check else None,
            "seconds": round(self.seconds, 3),
            "phases": {name: round(seconds, 3) for name, seconds in self.phases},
            "exit": self.exit_code,
        }

    def but(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)
