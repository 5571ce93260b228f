"""The verbs of the library, each a few lines over the part that does it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_surgery import checks
from moe_surgery.errors import UsageError
from moe_surgery.models.checkpoint import CONFIG, Digest, digest
from moe_surgery.operate.apply import Operation, Progress, Settings
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack, Rule
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.costs import Costs
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
    directory: Path | None
    quantisation: Quantisation | None = None

    @classmethod
    def of(cls, model: Model, trust_remote_code: bool = False, dtype: str | None = None) -> _Subject:
        if not isinstance(model, nn.Module | str | Path):
            raise UsageError(f"a model is a module, a directory or a hub id, not {checks.shown(model)}")
        if isinstance(model, nn.Module):
            config = getattr(model, "config", None)
            name = str(getattr(config, "name_or_path", "") or "")
            directory = Path(name) if name and os.path.isfile(os.path.join(name, CONFIG)) else None
            return cls(name or type(model).__name__, model, config, directory)
        from moe_surgery.models.opening import open_meta

        opened = open_meta(str(model), trust_remote_code=trust_remote_code, dtype=dtype)
        return cls(opened.name, opened.module, opened.config, opened.directory, opened.quantisation)

    def obstacle(self, item: Surveyed) -> str | None:
        """Why a site that can be read can't be operated on in the numbers that its weights are kept in."""
        if self.quantisation is None or item.reading is None:
            return None
        mlp = item.reading.layout.experts[0]
        if not self.quantisation.covers(f"{item.site.path}.{mlp.gate.path.removesuffix('.weight')}"):
            return None
        return f"its weights are {self.quantisation.scheme}; {self.quantisation.advice}"

    def digest(self) -> Digest | None:
        """What tells the checkpoint it came from from others, if that is known."""
        return None if self.directory is None else digest(self.directory)


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
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What would be done with every MoE-looking site of ``model``, and why. Nothing is touched.

    ``model`` is a live module, a directory (config.json is enough) or a hub id. ``packs`` are names of installed packs
    or paths of ``.toml`` files, None for all installed. ``only`` and ``skip`` are globs over paths. A model
    that is named is planned for ``device``, which needn't be here (None: the CPU), in ``dtype`` (None: the checkpoint's
    own); what is then loaded otherwise doesn't fit the plan. Raises
    :class:`~moe_surgery.errors.ExpectationError` if a rule or ``expect`` counts otherwise, or under ``strict`` if a
    site is missed or refused.
    """
    selection = Selection(checks.texts(only, "only"), checks.texts(skip, "skip"), expect, strict)
    if isinstance(model, nn.Module) and (device is not None or dtype is not None):
        raise UsageError("a module is planned for as it is; device and dtype are for a model that is named")
    from moe_surgery.models.dtype_device import device_type, dtype_name

    kind, kept = None if device is None else device_type(device), None if dtype is None else dtype_name(dtype)
    subject = _Subject.of(model, trust_remote_code, kept)
    made = _plan(subject, survey(subject.module), packs, target, selection, kind or "cpu")
    return replace(made, device=kind, dtype=kept)


def _plan(
    subject: _Subject,
    sites: Sequence[Surveyed],
    packs: Packs,
    target: str,
    selection: Selection,
    device: str = "cpu",
) -> Plan:
    """A plan; ``device`` is the type of device that a model on the meta device is planned for."""
    started = time.perf_counter()
    name, config, chosen = subject.name, subject.config, load_packs(packs)
    made = make_plan(name, sites, config, chosen, target, get_target, selection, subject.obstacle, device)
    real = next((parameter.device.type for parameter in subject.module.parameters() if not parameter.is_meta), device)
    costs = Costs.of(subject.module, [step.path for step in made.steps if step.outcome == "replaced"], real)
    return replace(made, checkpoint=subject.digest(), seconds=time.perf_counter() - started, costs=costs)


def apply(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    undoable: bool = True,
    margin: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    model_check: bool | Mapping[str, Any] = True,
    **as_plan: Any,
) -> Report:
    """Replace the blocks of a live model in place: all or nothing, every block proven before any is exchanged.

    Without ``plan`` one is made with the arguments of :func:`plan`. ``undoable`` keeps the originals for
    :func:`undo`; the report says what that costs. ``undoable=False`` needs at most one block of extra memory. With
    ``model_check`` the whole model, or what parts of it take a few made-up token ids, runs before and after and must do
    the same; arguments to call it with may be given instead. A block whose weights let no check tell it from a wrong
    one is refused, and the others are replaced. Raises :class:`~moe_surgery.errors.ProofError` if a block or the model
    with the new blocks is wrong, :class:`~moe_surgery.errors.ExpectationError` if ``expect`` or ``strict`` ask for more
    than can be proven, and :class:`~moe_surgery.errors.PlanError` if ``plan`` doesn't fit the model; the model is then
    as it was.
    """
    checks.margin(margin), checks.seed(seed), checks.truth(undoable, "undoable")
    expect, strict = as_plan.get("expect"), bool(as_plan.get("strict"))
    settings = Settings(margin, seed, undoable, on_progress, model_check, expect, strict)
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

    A directory or hub id is loaded with its weights. The report's ``exit_code`` is 12 if a block is wrong; a block that
    these weights don't let be proven is refused.
    """
    checks.margin(margin), checks.seed(seed)
    if isinstance(model, str | Path):
        from moe_surgery.models.opening import load_model

        model = load_model(str(model), trust_remote_code=as_plan.pop("trust_remote_code", False)).module
    expect, strict = as_plan.get("expect"), bool(as_plan.get("strict"))
    settings = Settings(margin, seed, True, on_progress, False, expect, strict)
    return _operation(model, plan, settings, as_plan).verify()


def _operation(model: nn.Module, made: Plan | None, settings: Settings, as_plan: dict[str, Any]) -> Operation:
    started = time.perf_counter()
    subject = _Subject.of(model)
    if made is not None and not isinstance(made, Plan):
        raise UsageError(f"plan must be a Plan, not {checks.shown(made)}; Plan.load reads a saved one")
    unknown = sorted(as_plan.keys() - {"packs", "target", "only", "skip", "expect", "strict"})
    if unknown:
        raise UsageError(f"unknown: {', '.join(unknown)}")
    sites = survey(model)
    if made is None:
        packs, target = as_plan.pop("packs", None), as_plan.pop("target", "auto")
        only, skip = checks.texts(as_plan.pop("only", ()), "only"), checks.texts(as_plan.pop("skip", ()), "skip")
        made = _plan(subject, sites, packs, target, Selection(only, skip, **as_plan))
    elif as_plan:
        raise UsageError(f"a plan is given; {', '.join(as_plan)} would have to be planned anew")
    else:
        made.check_origin(subject.digest(), subject.name)
        made.warn_of_versions()
    operation = Operation(model, made, sites, get_target, settings)
    operation.read = operation.started - started
    return operation


def _live(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"apply takes a loaded model, not {type(model).__name__}; the command line loads directories")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model's weights are on the meta device; load them before operating")
    return model


def undo(report: Report) -> None:
    """Put the old blocks back: the model has the same module objects and storages as before ``apply``."""
    if not isinstance(report, Report):
        raise UsageError(f"undo takes the report that apply returned, not {checks.shown(report)}")
    if report.transaction is None:
        raise UsageError(f"nothing to undo: the report says {report.done}")
    report.transaction.undo()


def explain(model: Model, path: str, *, packs: Packs = None, trust_remote_code: bool = False) -> Explanation:
    """What is known of the site at ``path``. Raises :class:`UsageError`, naming the sites, if there is none."""
    from moe_surgery.report.explanation import Explanation

    if not isinstance(path, str):
        raise UsageError(f"a site's path is wanted, not {checks.shown(path)}")
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
