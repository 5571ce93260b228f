"""Deciding every site of a survey: the rule that fits it, the target that takes it, or the reason why neither does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from moe_surgery.errors import ExpectationError
from moe_surgery.packs.match import Match, Miss
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.selection import Selection
from moe_surgery.planning.trace import traced
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.report.outcomes import Step
from moe_surgery.targets.auto import AutoTarget
from moe_surgery.targets.base import Context, SwappedBlock

if TYPE_CHECKING:
    from moe_surgery.calling import Calling
    from moe_surgery.packs.pack import Pack, Rule
    from moe_surgery.planning.survey import Surveyed
    from moe_surgery.targets.base import Target


def make_plan(
    name: str,
    sites: Sequence[Surveyed],
    config: object,
    packs: Sequence[Pack],
    target: str,
    targets: Callable[[str], Target],
    selection: Selection,
    obstacle: Callable[[Surveyed], str | None] = lambda item: None,
    device: str = "cpu",
) -> Plan:
    """Decide every site. ``targets`` gives a target by name; a rule's own wins where ``target`` is "auto".

    ``obstacle`` says why a site can't be operated on whatever the target. ``device`` is the type of device that a model
    on the meta device is planned for.

    Raises ``ExpectationError`` (with the report) if a rule or the caller expected more.
    """
    selection.check(sites)
    matches = {item.site.path: match_rules(item, packs, config) for item in sites}
    wanted, named = targets_of_rules(packs, target), cache(targets)

    def choose(rule: str) -> Target:
        return named(wanted[rule])

    decided = (_decide(item, matches[item.site.path], choose, selection, obstacle(item), device) for item in sites)
    steps = tuple(traced(step, matches[step.path]) for step in decided)
    plan = Plan(name, target, steps)
    try:
        matched: list[str | None] = [match.rule for match in matches.values() if isinstance(match, Match)]
        matched += [item.site.module.rule for item in sites if isinstance(item.site.module, SwappedBlock)]
        check_expectations(
            plan, matched, packs, config, selection, lambda rule: _taken(rule, sites, matches, packs, config)
        )
    except ExpectationError as error:
        error.report = plan.report().but(exit_code=error.exit_code)
        raise
    return plan


def targets_of_rules(packs: Sequence[Pack], target: str) -> dict[str, str]:
    """The target of each rule, by its full name: ``target``, but where that is "auto" a rule's own, if it has one."""
    own = target == "auto"
    return {rule.full_name: (rule.target if own else None) or target for pack in packs for rule in pack.rules}


def match_rules(item: Surveyed, packs: Sequence[Pack], config: object) -> Match | Miss | None:
    """The first rule's match; else the miss that came nearest. None if there is nothing to match."""
    if item.reading is None:
        return None if item.swapped else Miss(item.site, (), item.unread)
    results = [result for _, result in trails(item, packs, config)]
    match = next((result for result in results if isinstance(result, Match)), None)
    if match is None and not results:
        return Miss(item.site, (), "no rule to match it with")
    return match or min(results, key=lambda miss: sum(not clue.held for clue in miss.trail))


def trails(item: Surveyed, packs: Sequence[Pack], config: object) -> list[tuple[Rule, Match | Miss]]:
    """Every rule held against a site that was read."""
    assert item.reading is not None
    rules = [rule for pack in packs for rule in pack.rules]
    return [(rule, rule.match(item.site, item.reading, config)) for rule in rules]


def _decide(
    item: Surveyed,
    match: Match | Miss | None,
    choose: Callable[[str], Target],
    selection: Selection,
    obstacle: str | None,
    device: str,
) -> Step:
    path, kind = item.site.path, item.site.kind
    if match is None:
        return Step(path, kind, "kept", "already fused")
    excuse = selection.excuse(path)
    if isinstance(match, Miss):
        return Step(path, kind, "kept" if excuse else "missed", excuse or match.reason)
    rule, spec = match.rule, match.reading.spec
    if excuse:
        return Step(path, kind, "kept", excuse, rule, None, spec)
    if item.held is not None:
        return Step(path, kind, "refused", item.held, rule, None, spec)
    target = choose(rule)
    # Which target would have been picked isn't known where none was asked.
    named = None if isinstance(target, AutoTarget) else target.name
    if obstacle is not None:
        return Step(path, kind, "refused", obstacle, rule, named, spec)
    tensors = list(item.site.module.parameters())
    live = not any(tensor.is_meta for tensor in tensors)
    if live and any(module.training for module in item.site.module.modules()):
        reason = "the model is in training mode, and the replacement has no backward pass; call model.eval()"
        return Step(path, kind, "refused", reason, rule, named, spec)
    dtype = str(own_dtype(dict(item.site.module.named_parameters()))).removeprefix("torch.")
    context = Context(tensors[0].device.type if live else device, dtype, live)
    if isinstance(target, AutoTarget):
        target, note = target.pick(spec.built, context)
    else:
        note = target.remark(spec.built, context)
    refusal = target.accepts(spec.built, context)
    if refusal is not None:
        reason = f"{refusal.reason}; {note}" if note else refusal.reason
        return Step(path, kind, "refused", reason, rule, target.name, spec)
    notes = [note, _read_without(match.reading.calling)]
    reason = " · ".join(part for part in (spec.sentence(), *notes) if part)
    return Step(path, kind, "replaced", reason, rule, target.name, spec)


def _read_without(calling: Calling) -> str | None:
    """Of a block that could be given more: what becomes of it where the model does so, which only its run shows."""
    fixed = [argument for argument in calling.arguments if argument.role == "fixed" and not argument.many]
    names = [argument.name for argument in fixed if argument.required or argument.default is None]
    if not names:
        return None
    return f"{' and '.join(names)} at None; given a tensor there by the model, apply reads it again or leaves it alone"


def _taken(
    rule: Rule,
    sites: Sequence[Surveyed],
    matches: Mapping[str, Match | Miss | None],
    packs: Sequence[Pack],
    config: object,
) -> str:
    """Which rules before ``rule`` matched sites that fit it too, as the end of a sentence; empty if none did."""
    firsts = [
        found.rule
        for item in sites
        if isinstance(found := matches[item.site.path], Match) and found.rule != rule.full_name
        if item.reading is not None and rule.match(item.site, item.reading, config)
    ]
    origins = {other.full_name: other.origin for pack in packs for other in pack.rules}
    told = [f"{first} ({origins[first]}) first matched {firsts.count(first)}" for first in dict.fromkeys(firsts)]
    return f"; of the sites that fit it, {' and '.join(told)}" if told else ""


def check_expectations(
    plan: Plan,
    matched: list[str | None],
    packs: Sequence[Pack],
    config: object,
    selection: Selection,
    taken: Callable[[Rule], str] = lambda rule: "",
    excused: Callable[[Rule, int], bool] = lambda rule, missing: False,
) -> None:
    """Raises ``ExpectationError`` if a rule or the caller wanted other counts; ``matched``: each match's rule.

    ``taken`` says what became of sites that fit a rule but went to others, ``excused`` whether it may miss so many.
    """
    for pack in packs:
        for rule in pack.rules:
            wanted, found = rule.expected(config), matched.count(rule.full_name)
            if wanted is not None and wanted != found and not (found < wanted and excused(rule, wanted - found)):
                raise ExpectationError(
                    f"{rule.full_name} expects {wanted} sites and matches {found} ({rule.origin}){taken(rule)}"
                )
    report = plan.report()
    if selection.expect is not None and len(report.replaced) != selection.expect:
        raise ExpectationError(f"expected {selection.expect} sites to replace, found {len(report.replaced)}")
    if selection.strict and (report.missed or report.refused):
        first = (*report.missed, *report.refused)[0]
        count = len(report.missed) + len(report.refused)
        raise ExpectationError(f"strict: {count} sites are missed or refused, first {first.path}: {first.reason}")
