"""The rows of a report: sites of one kind with one outcome, their indices folded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moe_surgery.report.folded_paths import fold_paths
from moe_surgery.report.outcomes import Outcome, Outcomes, Step

_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Row:
    """Sites that are alike in all that a report says of them.

    ``paths`` are folded, ``sites`` are the single ones, of which ``proven`` were asked. ``error`` is the largest error
    of their new blocks and ``margin`` the smallest margin, None where nothing was compared; ``reason`` is that of the
    site with the smallest margin.
    """

    outcome: Outcome
    kind: str
    target: str | None
    rule: str | None
    sentence: str | None
    reason: str
    paths: tuple[str, ...]
    sites: tuple[str, ...]
    passed: bool | None
    proven: int
    error: float | None
    margin: float | None

    @property
    def note(self) -> str | None:
        """What there is to say of replaced blocks beside what they compute, if anything."""
        known = f"{self.sentence} · "
        said = self.outcome in ("replaced", "right") and self.reason.startswith(known)
        return self.reason.removeprefix(known) if said else None


def rows(report: Outcomes) -> tuple[Row, ...]:
    """Group the steps of ``report``; rows come in the order of their first site in the model."""
    groups: dict[tuple[object, ...], list[Step]] = {}
    for step in report.steps:
        groups.setdefault(_key(step), []).append(step)
    return tuple(_row(steps) for steps in groups.values())


def _key(step: Step) -> tuple[object, ...]:
    sentence = step.spec.sentence() if step.spec else None
    # The reason of a proven or disproven site carries its own numbers: it would put every site in a row of its own.
    verdict = step.verdict
    measured = verdict is not None or step.outcome == "replaced"
    # Of blocks that are alike some may be proven for all.
    failed = verdict is not None and not verdict.passed
    # A rule that doesn't fit tells of the path that it met, which differs from site to site and nothing else does.
    reason = None if measured else step.reason.replace(step.path, "") if step.path else step.reason
    if verdict is not None and verdict.powerless:  # which says nothing of the block, so that none is the worst
        reason = _NUMBER.sub("#", step.reason)
    return step.outcome, step.kind, step.target, step.rule, sentence, failed, reason


def _row(steps: list[Step]) -> Row:
    first = steps[0]
    verdicts = [step.verdict for step in steps if step.verdict]
    compared = [v for v in verdicts if v.mutants or not v.powerless]
    errors = [v.reading_error if v.build_error is None else v.build_error for v in compared]
    worst = min(steps, key=lambda step: step.verdict.margin if step.verdict else math.inf)
    paths = tuple(path for path, _ in fold_paths(step.path for step in steps))
    reason = worst.reason
    if len(steps) > 1 and worst.path:
        reason = reason.replace(worst.path, ", ".join(paths))
    return Row(
        outcome=first.outcome,
        kind=first.kind,
        target=first.target,
        rule=first.rule,
        sentence=first.spec.sentence() if first.spec else None,
        reason=reason,
        paths=paths,
        sites=tuple(step.path for step in steps),
        passed=verdicts[0].passed if verdicts else None,
        proven=len(verdicts),
        error=max(errors, default=None),
        margin=min((verdict.margin for verdict in compared), default=None),
    )
