"""Coverage: every family's tiny model operated on in every setting, and what became of its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import ExpectationError, UsageError
from moe_surgery.installed.versions import versions
from moe_surgery.packs.clauses import ConfigAt, ModelType
from moe_surgery.packs.config_values import Absent
from moe_surgery.report.rows import rows
from moe_surgery.testing.families import DEFAULT, Family, families, family, model_config
from moe_surgery.testing.trial import Trial, attempt_family

if TYPE_CHECKING:
    from moe_surgery.packs.pack import Pack, Rule
    from moe_surgery.report.outcomes import Outcome
    from moe_surgery.report.rows import Row

SCHEMA = "moe-surgery/coverage/1"
ALL = "all"
UNSEEN = "no module of the model looks like a sparse-MoE block"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Line:
    """One kind of block of one family in one setting, and its end.

    ``block`` is its class name, ``paths`` the folded paths of its sites; both are empty where no site was seen.
    ``spec`` is what was read in one line, None if nothing was. ``margin`` is the least of the sites' proofs and
    ``error`` the largest build error, None without a proof. ``reason`` says why the block was not replaced.
    """

    family: str
    setting: str
    block: str
    paths: tuple[str, ...]
    outcome: Outcome
    rule: str | None
    spec: str | None
    margin: float | None
    error: float | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; a number that isn't finite is null."""
        return {**vars(self), "paths": list(self.paths), "margin": _finite(self.margin), "error": _finite(self.error)}


@dataclass(frozen=True, eq=False)
class Tried:
    """One model: its trial and a line for each kind of its blocks."""

    family: str
    setting: str
    trial: Trial
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "setting": self.setting,
            "right": self.trial.right,
            "wrong": self.trial.wrong,
            "moved": _finite(self.trial.moved),
            "restored": self.trial.restored,
            "blocks": [line.to_json() for line in self.lines],
        }


@dataclass(frozen=True, eq=False)
class Coverage:
    """What became of all models that were tried."""

    packs: tuple[str, ...]
    tried: tuple[Tried, ...]
    seconds: float
    strict: bool = False
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(line for one in self.tried for line in one.lines)

    @property
    def exit_code(self) -> int:
        """That of the first model that is wrong; else, under ``strict``, 11 if any block was missed or refused."""
        wrong = next((one.trial.exit_code for one in self.tried if not one.trial.right), 0)
        left = any(line.outcome in ("missed", "refused") for line in self.lines)
        return wrong or (ExpectationError.exit_code if self.strict and left else 0)

    def replaced(self) -> tuple[str, ...]:
        """The families of which every block that was tried is replaced, in every setting that was tried."""
        left = {line.family for line in self.lines if line.outcome != "replaced"}
        left |= {one.family for one in self.tried if not one.trial.right}
        return tuple(dict.fromkeys(one.family for one in self.tried if one.family not in left))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data of the versioned schema ``moe-surgery/coverage/1``."""
        return {
            "schema": SCHEMA,
            "versions": dict(self.versions),
            "packs": list(self.packs),
            "models": [one.to_json() for one in self.tried],
            "seconds": round(self.seconds, 3),
            "exit": self.exit_code,
        }


def choose(packs: Sequence[Pack], names: Sequence[str], settings: Sequence[str]) -> list[tuple[Family, str]]:
    """The families and settings to try: the named ones, else all that some rule of ``packs`` is about.

    Raises :class:`UsageError` for a name that isn't there, and if the packs are about none of the families.
    """
    chosen = [family(name) for name in names] or list(families().values())
    known = {setting for one in chosen for setting in one.settings} | {DEFAULT, ALL}
    for setting in settings:
        if setting not in known:
            raise UsageError(f"no family has a setting {setting!r}; there are {', '.join(sorted(known))}")
    fitting = [one for one in chosen if any(about(rule, one) for pack in packs for rule in pack.rules)]
    if not fitting:
        raise UsageError(
            f"no rule of {', '.join(pack.name for pack in packs)} is about any of the {len(chosen)} families here; "
            "moe_surgery.testing.PackTest tests a pack with a model of your own"
        )
    return [(one, setting) for one in fitting for setting in _settings(one, settings)]


def about(rule: Rule, one: Family) -> bool:
    """Whether a rule can match anything in the model of a family: its config's base is there and of the right type."""
    view = rule.view(model_config(one))
    for clause in rule.clauses:
        if isinstance(clause, ConfigAt) and isinstance(view.node, Absent):
            return False
        if isinstance(clause, ModelType) and not clause.fits(view):
            return False
    return True


def _settings(one: Family, wanted: Sequence[str]) -> Iterator[str]:
    for setting in (DEFAULT, *one.settings):
        if setting in wanted or ALL in wanted:
            yield setting


def cover(
    packs: Sequence[Pack], cases: Sequence[tuple[Family, str]], on_progress: Progress | None = None
) -> Iterator[Tried]:
    """Try every case, one at a time."""
    for done, (one, setting) in enumerate(cases):
        if on_progress is not None:
            on_progress(done, len(cases), f"{one.name} {setting}")
        trial = attempt_family(one, setting, packs=packs)
        yield Tried(one.name, setting, trial, tuple(_lines(one.name, setting, trial)))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _lines(name: str, setting: str, trial: Trial) -> Iterator[Line]:
    found = rows(trial.report) if trial.report is not None else ()
    for row in found:
        yield _line(name, setting, row)
    if not found:
        reason = UNSEEN if trial.fault is None else str(trial.fault)
        yield Line(name, setting, "", (), "missed", None, None, None, None, reason)


def _line(name: str, setting: str, row: Row) -> Line:
    return Line(
        family=name,
        setting=setting,
        block=row.kind,
        paths=row.paths,
        outcome=row.outcome,
        rule=row.rule,
        spec=row.sentence,
        margin=row.margin,
        error=row.error,
        reason=None if row.outcome == "replaced" else row.reason,
    )
