"""The verbs of the library, each a few lines over the part that does it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_surgery import checks
from moe_surgery.errors import UsageError
from moe_surgery.operate.alone import alone
from moe_surgery.operate.apply import Operation
from moe_surgery.operate.settings import Progress, Settings
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.selection import Selection
from moe_surgery.planning.survey import Surveyed, survey
from moe_surgery.report.outcomes import Step
from moe_surgery.report.report import Report
from moe_surgery.subject import Model, Packs, Subject, explained, planned
from moe_surgery.targets import get_target
from moe_surgery.targets.folded.ahead import KernelsAhead

if TYPE_CHECKING:
    from moe_surgery.report.explanation import Explanation


def scan(model: Model, *, trust_remote_code: bool = False) -> Report:
    """Every MoE-looking site and what is known of it. Nothing is planned, no weight is touched.

    Args:
        model: A live module, a directory (config.json is enough) or a hub id.
        trust_remote_code: Whether a checkpoint's own code may run.

    Returns:
        A report in which sites that can be read are kept, with their spec, and the others missed, with the reason.

    Raises:
        ModelError: The model can't be opened.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> [step.path for step in moe_surgery.scan(model).kept]
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    started = time.perf_counter()
    subject = Subject.of(model, trust_remote_code)
    steps = tuple(_scanned(item, subject) for item in survey(subject.module))
    plan_ = Plan(subject.name, "none", steps)
    return plan_.report().but(done="scanned", seconds=time.perf_counter() - started)


def _scanned(item: Surveyed, subject: Subject) -> Step:
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

    Args:
        model: A live module, a directory (config.json is enough) or a hub id.
        packs: Names of installed packs, paths of ``.toml`` files or packs; None for all installed.
        target: What blocks are replaced with: "auto", "folded", "vllm" or "reference".
        only: Globs over paths: sites that none of them covers are kept.
        skip: Globs over paths: sites that one of them covers are kept.
        expect: How many sites must be replaced.
        strict: Whether a site that is missed or refused is an error.
        device: Where a model that is named will be, which needn't be here (None: the CPU).
        dtype: What a model that is named will be loaded in (None: the checkpoint's own).
        trust_remote_code: Whether a checkpoint's own code may run.

    Returns:
        A plan, which can be printed, saved, reviewed and given to ``apply``. What is then loaded on another device
        or in another dtype doesn't fit it.

    Raises:
        ExpectationError: A rule or ``expect`` counts otherwise; or, under ``strict``, a site is missed or refused.
        ModelError: The model can't be opened.
        PackError: A pack can't be read.
        UsageError: There is no such target, device or dtype.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> plan = moe_surgery.plan(model, skip=["*.layers.1.*"])
        >>> [(step.path, step.outcome) for step in plan.steps]
        [('model.layers.0.mlp', 'replaced'), ('model.layers.1.mlp', 'kept')]
    """
    selection = Selection(checks.texts(only, "only"), checks.texts(skip, "skip"), expect, strict)
    if isinstance(model, nn.Module) and (device is not None or dtype is not None):
        raise UsageError("a module is planned for as it is; device and dtype are for a model that is named")
    from moe_surgery.models.dtype_device import device_type, dtype_name

    kind, kept = None if device is None else device_type(device), None if dtype is None else dtype_name(dtype)
    subject = Subject.of(model, trust_remote_code, kept)
    made = planned(subject, survey(subject.module), packs, target, selection, kind or "cpu")
    return replace(made, device=kind, dtype=kept)


@alone
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

    A block whose weights let no check tell it from a wrong one is refused, and the others are replaced. After an error
    the model is as it was.

    Args:
        model: A loaded module, in evaluation mode. New blocks take ``[B, S, H]`` or ``[T, H]`` in its own dtype, and
            give the same shape.
        plan: What to do; None to make a plan with the other arguments of ``plan``.
        undoable: Whether to keep the originals for ``undo``; the report says how many bytes that is. Without, at
            most one block of extra memory is needed.
        margin: How many times as far from the reference as the new block every mutant must be.
        seed: Of the tokens that blocks are asked about.
        on_progress: Called with the blocks done, those there are, and the path of the one at hand.
        model_check: Whether the whole model, or what parts of it take a few made-up token ids, runs before and after
            and must do the same; or the arguments to call it with. Without, a block that the model gives a mask refuses
            its first call, since it was read without one.
        **as_plan: ``packs``, ``target``, ``only``, ``skip``, ``expect`` and ``strict``, as for ``plan``.

    Returns:
        A report: what became of every site, with its proof.

    Raises:
        ProofError: A block, or the model with the new blocks, is wrong.
        ExpectationError: ``expect`` or ``strict`` ask for more than can be proven.
        PlanError: ``plan`` doesn't fit the model.
        UsageError: An argument can't be used as given.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> report = moe_surgery.apply(model, target="reference")
        >>> len(report.replaced), report.replaced[0].verdict.passed
        (2, True)
    """
    checks.margin(margin), checks.seed(seed), checks.truth(undoable, "undoable")
    expect, strict = as_plan.get("expect"), bool(as_plan.get("strict"))
    settings = Settings(margin, seed, undoable, on_progress, model_check, expect, strict)
    subject = Subject.of(_live(model))
    with KernelsAhead(subject.module) as kernels:
        return _operation(subject, plan, settings, as_plan, kernels).apply()


@alone
def verify(
    model: Model,
    plan: Plan | None = None,
    *,
    margin: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
    model_check: bool | Mapping[str, Any] = True,
    **as_plan: Any,
) -> Report:
    """The proof alone: every block is built and measured, the model is left as it was.

    Args:
        model: A module, or a directory or hub id that is loaded with its weights.
        plan: What to build; None to make a plan with the other arguments of ``plan``.
        margin: How many times as far from the reference as the new block every mutant must be.
        seed: Of the tokens that blocks are asked about.
        on_progress: Called with the blocks done, those there are, and the path of the one at hand.
        model_check: As for ``apply``, but the model runs once only, to see what it gives its blocks: one that gets a
            mask is proven with it.
        **as_plan: ``packs``, ``target``, ``only``, ``skip``, ``expect`` and ``strict``, as for ``plan``; with a
            name, ``trust_remote_code`` too.

    Returns:
        A report, whose ``exit_code`` is 12 if a block is wrong. A block that these weights don't let be proven is
        refused.

    Raises:
        ModelError: The model can't be loaded.
        PlanError: ``plan`` doesn't fit the model.
        UsageError: An argument can't be used as given.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> moe_surgery.verify(model, target="reference").exit_code
        0
    """
    checks.margin(margin), checks.seed(seed)
    if isinstance(model, str | Path):
        from moe_surgery.models.opening import load_model

        model = load_model(str(model), trust_remote_code=as_plan.pop("trust_remote_code", False)).module
    expect, strict = as_plan.get("expect"), bool(as_plan.get("strict"))
    settings = Settings(margin, seed, True, on_progress, model_check, expect, strict)
    subject = Subject.of(model)
    with KernelsAhead(subject.module) as kernels:
        return _operation(subject, plan, settings, as_plan, kernels).verify()


def _operation(
    subject: Subject, made: Plan | None, settings: Settings, as_plan: dict[str, Any], kernels: KernelsAhead
) -> Operation:
    started = time.perf_counter()
    if made is not None and not isinstance(made, Plan):
        raise UsageError(f"plan must be a Plan, not {checks.shown(made)}; Plan.load reads a saved one")
    unknown = sorted(as_plan.keys() - {"packs", "target", "only", "skip", "expect", "strict"})
    if unknown:
        raise UsageError(f"unknown: {', '.join(unknown)}")
    sites = survey(subject.module)
    if made is None:
        packs, target = as_plan.pop("packs", None), as_plan.pop("target", "auto")
        only, skip = checks.texts(as_plan.pop("only", ()), "only"), checks.texts(as_plan.pop("skip", ()), "skip")
        made = planned(subject, sites, packs, target, Selection(only, skip, **as_plan))
    elif as_plan:
        raise UsageError(f"a plan is given; {', '.join(as_plan)} would have to be planned anew")
    else:
        made.check_origin(subject.digest(), subject.name)
        made.warn_of_versions()
    return Operation(subject.module, made, sites, get_target, settings, kernels, started)


def _live(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"apply takes a loaded model, not {type(model).__name__}; the command line loads directories")
    if any(parameter.is_meta for parameter in model.parameters()):
        if any("_hf_hook" in vars(module) for module in model.modules()):
            raise UsageError(
                "accelerate offloads the model's weights and brings them in for each call; load it without offloading"
            )
        raise UsageError("the model's weights are on the meta device; load them before operating")
    return model


@alone
def undo(report: Report) -> None:
    """Put the old blocks back: the model has the same module objects and storages as before ``apply``.

    Args:
        report: What ``apply`` returned.

    Raises:
        UsageError: There is nothing to undo in the report.
        SurgeryError: It was undone already, the originals were given up (``undoable=False``), or somebody else has
            exchanged a block since.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> block = model.model.layers[0].mlp
        >>> moe_surgery.undo(moe_surgery.apply(model, target="reference"))
        >>> model.model.layers[0].mlp is block
        True
    """
    if not isinstance(report, Report):
        raise UsageError(f"undo takes the report that apply returned, not {checks.shown(report)}")
    if report.transaction is None:
        raise UsageError(f"nothing to undo: the report says {report.done}")
    report.transaction.undo()


def explain(model: Model, path: str, *, packs: Packs = None, trust_remote_code: bool = False) -> Explanation:
    """What is known of one site: how it was read, and which clause of which rule holds or fails there.

    Args:
        model: A live module, a directory (config.json is enough) or a hub id.
        path: The site's, as ``scan`` has it.
        packs: Names of installed packs, paths of ``.toml`` files or packs; None for all installed.
        trust_remote_code: Whether a checkpoint's own code may run.

    Returns:
        An explanation, which prints like ``moe-surgery explain``.

    Raises:
        UsageError: There is no such site; the message names those there are.
        ModelError: The model can't be opened.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> moe_surgery.explain(model, "model.layers.0.mlp").spec.sentence()
        'softmax top-2 of 8 renormalised · experts 64→32 silu · shared 64 silu, sigmoid gate'
    """
    if not isinstance(path, str):
        raise UsageError(f"a site's path is wanted, not {checks.shown(path)}")
    return explained(Subject.of(model, trust_remote_code), path, load_packs(packs))
