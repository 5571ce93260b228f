"""What a step tells of how it came about: the clauses of the rule that came nearest, and where weights go."""

from __future__ import annotations

from dataclasses import replace

from moe_surgery.packs.match import Match, Miss
from moe_surgery.report.outcomes import Step
from moe_surgery.weights.routes import routes


def traced(step: Step, match: Match | Miss | None) -> Step:
    """``step`` with the trail of what was missed, or the routes of what was matched."""
    if isinstance(match, Miss):
        return replace(step, trail=match.trail)
    return step if match is None else replace(step, weights=routes(match.reading.layout))
