"""Whether an engine's model has as many blocks as rules expect, where it may be a part of its checkpoint's model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import nn

from moe_surgery.engine.orders import ENGINE_PLAN
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack, Rule
from moe_surgery.planning.deciding import check_expectations
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.selection import Selection

_log = logging.getLogger("moe_surgery")


def check_counts(
    plan: Plan,
    model: nn.Module,
    matches: Iterable[Match | Miss | None],
    fused: Sequence[str],
    packs: Sequence[Pack],
    checkpoint: object,
) -> None:
    """Raise ``ExpectationError`` if a rule matches other numbers of sites than it expects.

    It may match fewer where what it lacks is at the paths ``fused``, which have blocks that vLLM has fused and that no
    rule was matched with. And an engine may build one part of its checkpoint's model, such as a talker alone: of a
    rule nothing is expected, and that is told, where no module stands where it looks and no site is left over.
    """

    def excused(rule: Rule, missing: int) -> bool:
        if missing <= sum(map(rule.looks_at, fused)):
            return True
        if plan.report().missed or any(rule.looks_at(path) for path, _ in model.named_modules()):
            return False
        built = plan.model.removeprefix(ENGINE_PLAN)
        _log.warning("%s: no module of %s is where it looks, so nothing is expected of it", rule.full_name, built)
        return True

    matched: list[str | None] = [match.rule for match in matches if isinstance(match, Match)]
    check_expectations(plan, matched, packs, checkpoint, Selection(), excused=excused)
