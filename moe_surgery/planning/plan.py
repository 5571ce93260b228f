"""The plan: what is to be done with every site, decided before anything is touched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import ExpectationError, PlanError
from moe_surgery.installed.versions import versions
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pattern import Pattern
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.report.outcomes import Step
from moe_surgery.report.report import Report
from moe_surgery.spec import MoESpec
from moe_surgery.targets.auto import AutoTarget
from moe_surgery.targets.base import Context, SwappedBlock

if TYPE_CHECKING:
    from moe_surgery.packs.pack import Pack, Rule
    from moe_surgery.planning.survey import Surveyed
    from moe_surgery.targets.base import Target

SCHEMA = "moe-surgery/plan/1"


@dataclass(frozen=True)
class Plan:
    """One step per site, in the order of the module tree. ``model`` is the directory, hub id or class planned for.

    A plan can be saved, reviewed, and applied unchanged later; applying it to a model that no longer fits is an error.
    """

    model: str
    target: str
    steps: tuple[Step, ...]
    versions: dict[str, str] = field(default_factory=versions, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what the plan does: its steps and target, not the model's name or today's versions."""
        data = [{**step.to_json(), "reason": None} for step in self.steps]
        text = json.dumps([SCHEMA, self.target, data], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def report(self) -> Report:
        return Report(self.model, "planned", self.steps, self.fingerprint, self.versions, self.seconds)

    def to_json(self) -> dict[str, Any]:
        sites = [{key: value for key, value in step.to_json().items() if key != "proof"} for step in self.steps]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "target": self.target,
            "fingerprint": self.fingerprint,
            "versions": self.versions,
            "sites": sites,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises :class:`PlanError` if ``data`` isn't a plan, or was changed after it was made."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"not a plan of schema {SCHEMA} (found {found})")
        try:
            steps = tuple(_step(site) for site in data["sites"])
            plan = cls(data["model"], data["target"], steps, dict(data["versions"]))
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is incomplete: {error}") from error
        if plan.fingerprint != data.get("fingerprint"):
            raise PlanError(
                f"the plan was changed: its fingerprint is {plan.fingerprint}, it says {data.get('fingerprint')}"
            )
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        temporary = Path(f"{path}.{os.getpid()}.part")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan. Raises :class:`PlanError` naming the file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: not a plan: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _step(site: dict[str, Any]) -> Step:
    spec = None if site["spec"] is None else MoESpec.from_json(site["spec"])
    return Step(site["path"], site["kind"], site["outcome"], site["reason"], site["rule"], site["target"], spec)


@dataclass(frozen=True)
class Selection:
    """Which sites the caller wants: globs over paths, and what must come of it."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    expect: int | None = None
    strict: bool = False

    def excuse(self, path: str) -> str | None:
        """Why a site is left out by the caller, if it is."""
        skipped = next((glob for glob in self.skip if Pattern(glob).matches(path)), None)
        if skipped is not None:
            return f"skipped by {skipped}"
        if self.only and not any(Pattern(glob).matches(path) for glob in self.only):
            return f"not among {', '.join(self.only)}"
        return None

    def check(self, sites: Sequence[Surveyed]) -> None:
        """Raises :class:`ExpectationError` for a glob that no site fits: it was meant to do something."""
        for glob in (*self.only, *self.skip):
            if not any(Pattern(glob).matches(item.site.path) for item in sites):
                raise ExpectationError(f"no MoE-looking site fits {glob} (** stands for any number of path segments)")


def make_plan(
    name: str,
    sites: Sequence[Surveyed],
    config: object,
    packs: Sequence[Pack],
    target: str,
    targets: Callable[[str], Target],
    selection: Selection,
    obstacle: Callable[[Surveyed], str | None] = lambda item: None,
) -> Plan:
    """Decide every site. ``targets`` gives a target by name; a rule's own wins where ``target`` is "auto".

    ``obstacle`` says why a site can't be operated on whatever the target.

    Raises :class:`ExpectationError` (with the report) if a rule or the caller expected more.
    """
    selection.check(sites)
    matches = {item.site.path: match_rules(item, packs, config) for item in sites}
    wanted, named = targets_of_rules(packs, target), cache(targets)

    def choose(rule: str) -> Target:
        return named(wanted[rule])

    steps = tuple(_decide(item, matches[item.site.path], choose, selection, obstacle(item)) for item in sites)
    plan = Plan(name, target, steps)
    try:
        matched: list[str | None] = [match.rule for match in matches.values() if isinstance(match, Match)]
        matched += [item.site.module.rule for item in sites if isinstance(item.site.module, SwappedBlock)]
        check_expectations(plan, matched, packs, config, selection)
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
    target = choose(rule)
    if obstacle is not None:
        return Step(path, kind, "refused", obstacle, rule, target.name, spec)
    tensors = list(item.site.module.parameters())
    live = not any(tensor.is_meta for tensor in tensors)
    if live and any(module.training for module in item.site.module.modules()):
        reason = "the model is in training mode, and the replacement has no backward pass; call model.eval()"
        return Step(path, kind, "refused", reason, rule, target.name, spec)
    dtype = str(own_dtype(dict(item.site.module.named_parameters()))).removeprefix("torch.")
    context = Context(tensors[0].device.type if live else "cpu", dtype, live)
    note = None
    if isinstance(target, AutoTarget):
        target, note = target.pick(spec, context)
    refusal = target.accepts(spec, context)
    if refusal is not None:
        reason = f"{refusal.reason}; {note}" if note else refusal.reason
        return Step(path, kind, "refused", reason, rule, target.name, spec)
    reason = f"{spec.sentence()} · {note}" if note else spec.sentence()
    return Step(path, kind, "replaced", reason, rule, target.name, spec)


def check_expectations(
    plan: Plan, matched: list[str | None], packs: Sequence[Pack], config: object, selection: Selection
) -> None:
    """Raises :class:`ExpectationError` if a rule or the caller wanted other counts; ``matched``: each match's rule."""
    for pack in packs:
        for rule in pack.rules:
            wanted, found = rule.expected(config), matched.count(rule.full_name)
            if wanted is not None and wanted != found:
                raise ExpectationError(f"{rule.full_name} expects {wanted} sites and matches {found} ({rule.origin})")
    report = plan.report()
    if selection.expect is not None and len(report.replaced) != selection.expect:
        raise ExpectationError(f"expected {selection.expect} sites to replace, found {len(report.replaced)}")
    if selection.strict and (report.missed or report.refused):
        first = (*report.missed, *report.refused)[0]
        count = len(report.missed) + len(report.refused)
        raise ExpectationError(f"strict: {count} sites are missed or refused, first {first.path}: {first.reason}")
