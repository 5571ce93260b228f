"""The verbs of the library, each a few lines over the part that does it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_surgery.errors import UsageError
from moe_surgery.operate.apply import Operation, Progress, Settings
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack, Rule
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.plan import Plan, Selection, make_plan, trails
from moe_surgery.planning.survey import Surveyed, survey
from moe_surgery.report.outcomes import Step
from moe_surgery.report.report import Report
from moe_surgery.targets import get_target

if TYPE_CHECKING:
    from moe_surgery.models.quantisation import Quantisation
    from moe_surgery.report.explanation import Explanation

Model = nn.Module | str | Path
Packs = Sequence[str | Path | Pack] | None


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model to look at: live, or built on the meta device from a directory's or hub id's config."""

    name: str
    module: nn.Module
    config: object
    quantisation: Quantisation | None = None

    @classmethod
    def of(cls, model: Model, trust_remote_code: bool = False) -> _Subject:
        if isinstance(model, nn.Module):
            config = getattr(model, "config", None)
            name = getattr(config, "name_or_path", "") or type(model).__name__
            return cls(str(name), model, config)
        from moe_surgery.models.opening import open_meta

        opened = open_meta(str(model), trust_remote_code=trust_remote_code)
        return cls(opened.name, opened.module, opened.config, opened.quantisation)

    def obstacle(self, item: Surveyed) -> str | None:
        """Why a site that can be read can't be operated on in the numbers that its weights are kept in."""
        if self.quantisation is None or item.reading is None:
            return None
        mlp = item.reading.layout.experts[0]
        if not self.quantisation.covers(f"{item.site.path}.{mlp.gate.path.removesuffix('.weight')}"):
            return None
        return f"its weights are {self.quantisation.scheme}; {self.quantisation.advice}"


def scan(model: Model, *, trust_remote_code: bool = False) -> Report:
    """Every MoE-looking site and what is known of it. Nothing is planned, no weight is touched.

    Sites that can be read are reported as kept, with their spec; the others as missed, with the reason.
    """
    started = time.perf_counter()
    subject = _Subject.of(model, trust_remote_code)
    steps = tuple(_scanned(item, subject) for item in survey(subject.module))
    plan_ = Plan(subject.name, "none", steps)
    return plan_.report().but(seconds=time.perf_counter() - started)


def _scanned(item: Surveyed, subject: _Subject) -> Step:
    site, reading = item.site, item.reading
    if reading is not None:
        return Step(site.path, site.kind, "kept", subject.obstacle(item) or "readable", spec=reading.spec)
    return Step(site.path, site.kind, "kept" if item.swapped else "missed", item.unread or "already fused")


def plan(
    model: Model,
    *,
    packs: Packs = None,
    target: str = "auto",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    expect: int | None = None,
    strict: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """What would be done with every MoE-looking site of ``model``, and why. Nothing is touched.

    ``model`` is a live module, a directory (config.json is enough) or a hub id. ``packs`` are names of installed packs
    or paths of ``.toml`` files, None for all installed. ``only`` and ``skip`` are globs over paths. Raises
    :class:`~moe_surgery.errors.ExpectationError` if a rule or ``expect`` counts otherwise, or under ``strict`` if a
    site is missed or refused.
    """
    subject = _Subject.of(model, trust_remote_code)
    selection = Selection(tuple(only), tuple(skip), expect, strict)
    return _plan(subject, survey(subject.module), packs, target, selection)


def _plan(subject: _Subject, sites: Sequence[Surveyed], packs: Packs, target: str, selection: Selection) -> Plan:
    started = time.perf_counter()
    made = make_plan(
        subject.name, sites, subject.config, load_packs(packs), target, get_target, selection, subject.obstacle
    )
    return replace(made, seconds=time.perf_counter() - started)


def apply(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    undoable: bool = True,
    margin: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    **as_plan: Any,
) -> Report:
    """Replace the blocks of a live model in place: all or nothing, every block proven before any is exchanged.

    Without ``plan`` one is made with the arguments of :func:`plan`. ``undoable`` keeps the originals for
    :func:`undo`; the report says what that costs. ``undoable=False`` needs at most one block of extra memory. Raises
    :class:`~moe_surgery.errors.ProofError` if a proof fails and :class:`~moe_surgery.errors.PlanError` if ``plan``
    doesn't fit the model; the model is then as it was.
    """
    settings = Settings(margin, seed, undoable, on_progress)
    return _operation(_live(model), plan, settings, as_plan).apply()


def verify(
    model: Model,
    plan: Plan | None = None,
    *,
    margin: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    **as_plan: Any,
) -> Report:
    """The proof alone: every block is built and measured, the model is left as it was.

    A directory or hub id is loaded with its weights. The report's ``exit_code`` is 12 if a proof fails.
    """
    if not isinstance(model, nn.Module):
        from moe_surgery.models.opening import load_model

        model = load_model(str(model), trust_remote_code=as_plan.pop("trust_remote_code", False)).module
    return _operation(model, plan, Settings(margin, seed, True, on_progress), as_plan).verify()


def _operation(model: nn.Module, made: Plan | None, settings: Settings, as_plan: dict[str, Any]) -> Operation:
    subject = _Subject.of(model)
    sites = survey(model)
    if made is None:
        packs, target = as_plan.pop("packs", None), as_plan.pop("target", "auto")
        only, skip = tuple(as_plan.pop("only", ())), tuple(as_plan.pop("skip", ()))
        made = _plan(subject, sites, packs, target, Selection(only, skip, **as_plan))
    elif as_plan:
        raise UsageError(f"a plan is given; {', '.join(as_plan)} would have to be planned anew")
    return Operation(model, made, sites, get_target, settings)


def _live(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"apply takes a loaded model, not {type(model).__name__}; the command line loads directories")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model's weights are on the meta device; load them before operating")
    return model


def undo(report: Report) -> None:
    """Put the old blocks back: the model has the same module objects and storages as before ``apply``."""
    if report.transaction is None:
        raise UsageError(f"nothing to undo: the report says {report.done}")
    report.transaction.undo()


def explain(model: Model, path: str, *, packs: Packs = None, trust_remote_code: bool = False) -> Explanation:
    """What is known of the site at ``path``. Raises :class:`UsageError`, naming the sites, if there is none."""
    from moe_surgery.report.explanation import Explanation

    subject = _Subject.of(model, trust_remote_code)
    sites = survey(subject.module)
    item = next((item for item in sites if item.site.path == path), None)
    if item is None:
        known = ", ".join(item.site.path for item in sites[:5]) or "none"
        raise UsageError(f"no MoE-looking site at {path!r}; there are {len(sites)}: {known}{' …' * (len(sites) > 5)}")
    site, reading, chosen = item.site, item.reading, load_packs(packs)
    if reading is None:
        rules = () if item.swapped else tuple(rule for pack in chosen for rule in pack.rules)
        glances = [(rule, Miss(site, rule.glance(site, subject.config), item.unread)) for rule in rules]
        unread = item.unread or "already fused"
        return Explanation(path, site.kind, None, None, unread, tuple(sorted(glances, key=_nearness)))
    held = sorted(trails(item, chosen, subject.config), key=_nearness)
    return Explanation(
        path,
        site.kind,
        reading.spec,
        reading.combine,
        None,
        tuple(held),
        children=reading.children,
        alike=tuple(other.site.path for other in sites if other is not item and other.reading == reading),
        edits={
            rule.full_name: rule.edits(found, reading, subject.config)
            for rule, found in held
            if isinstance(found, Miss)
        },
    )


def _nearness(held: tuple[Rule, Match | Miss]) -> int:
    return sum(not clue.held for clue in held[1].trail)
