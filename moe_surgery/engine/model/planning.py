"""What is to be done with every site of an engine's model, decided before a weight is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from moe_surgery.engine.model.blocks import unfit
from moe_surgery.engine.model.counts import check_counts
from moe_surgery.engine.model.crossover import told
from moe_surgery.engine.model.folded_router import not_folded
from moe_surgery.engine.model.kernel_block import not_on_kernels, terms_in_engine
from moe_surgery.engine.model.served import obstacle, unfolded, unserved
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.engine.orders import ENGINE_PLAN, Orders
from moe_surgery.errors import ExpectationError, PlanError
from moe_surgery.kernels.choice import shape_name, timed_against_vllm
from moe_surgery.models.checkpoint import CONFIG, Digest, digest
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.deciding import match_rules, targets_of_rules
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.survey import Surveyed
from moe_surgery.planning.trace import traced
from moe_surgery.report.outcomes import Step

AUTO = "auto"
LAYER, FOLDED = "vllm", "folded"
"""What engines take: the shared-fused layer, or the shared expert among the routed ones (on a GPU, in our kernels)."""

_FALLEN = " · not folded, as it can't be proven: "

_EXACT = "TRITON_F32_DEFAULT", "ieee"
"""The setting with which Triton's products of float32 are of float32."""
ROUNDED = f"vLLM's kernels round float32 to TF32 here; {_EXACT[0]}={_EXACT[1]} has them not to"


def settled(sites: Sequence[EngineSite], config: VllmConfig) -> tuple[EngineSite, ...]:
    """The sites, of which those whose shared expert stands beside them go without it where it can't be fused here."""
    return tuple(_settled(item, config) for item in sites)


def _settled(item: EngineSite, config: VllmConfig) -> EngineSite:
    if item.alone is None or item.layer is None:
        return item
    reason = unserved(item, config) or unfit(item, config)
    if reason is None:
        return item
    return replace(item.alone, remark=f"its layer adds {item.layer.sibling} to it, which isn't fused: {reason}")


def make_engine_plan(
    architecture: str,
    model: nn.Module,
    sites: Sequence[EngineSite],
    config: VllmConfig,
    orders: Orders,
    given: Plan | None,
) -> Plan:
    """One step per site. Raises :class:`PlanError` if the plan that ``orders`` bring, ``given``, says otherwise.

    The counts that rules expect, and the sites of a plan, are those of a whole model; under pipeline parallelism a rank
    holds only some of its layers.
    """
    packs = load_packs(orders.packs)
    checkpoint = checkpoint_config(config)
    matches = {item.site.path: _match(item, packs, checkpoint) for item in sites}
    hindrance = obstacle(config)
    target = orders.target if given is None else given.target
    targets = targets_of_rules(packs, target)
    decided = (_decide(item, matches[item.site.path], targets, hindrance, config) for item in sites)
    steps = tuple(traced(step, matches[step.path]) for step in decided)
    plan = Plan(f"{ENGINE_PLAN}{architecture}", target, steps, _origin(config))
    whole = config.parallel_config.pipeline_parallel_size == 1
    if whole:
        fused = [item.site.path for item in sites if item.fused and not matches[item.site.path]]
        try:
            check_counts(plan, model, matches.values(), fused, packs, checkpoint)
        except ExpectationError as error:
            if hindrance is None:
                raise
            raise ExpectationError(f"{error}: {hindrance}") from error
    if given is not None and orders.plan is not None:
        _check_same(given, plan, orders.plan, whole=whole)
    return plan


def checkpoint_config(config: VllmConfig) -> object:
    """The config that rules read: the checkpoint's own file with the user's overrides, else what vLLM made of it."""
    assert config.model_config is not None
    file, overrides = Path(config.model_config.model) / "config.json", config.model_config.hf_overrides
    if not file.is_file() or callable(overrides):
        hf_config: object = config.model_config.hf_config
        return hf_config
    return _overridden(json.loads(file.read_text(encoding="utf-8")), overrides or {})


def _origin(config: VllmConfig) -> Digest | None:
    """What tells the checkpoint from others, where it is a directory."""
    directory = Path(config.model_config.model)
    return digest(directory) if (directory / CONFIG).is_file() else None


def _overridden(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with other values; those of inner configs are overridden one by one."""
    out = dict(data)
    for key, value in overrides.items():
        inner = out.get(key)
        both = isinstance(inner, dict) and isinstance(value, Mapping)
        out[key] = _overridden(inner, value) if both else value  # type: ignore[arg-type]
    return out


def fallen_back(plan: Plan, reasons: Mapping[str, str], whole: Collection[str] = ()) -> Plan:
    """``plan`` with vLLM's layer for the blocks that can't be proven folded, of the weights that were loaded.

    ``reasons`` has why, by path; blocks of the same kind as one of these, which may not be proven each, go with it.
    Those at the paths ``whole`` are vLLM's layer already, and stay as they are.
    """
    told = {_kind(step): reasons[step.path] for step in plan.steps if step.path in reasons}

    def fallen(step: Step) -> Step:
        reason = told.get(_kind(step))
        if reason is None:
            return step
        said = f"{step.reason}{_FALLEN}{reason}"
        if step.path in whole:
            return replace(step, outcome="kept", target=None, reason=said)
        return replace(step, target=LAYER, reason=said)

    return replace(plan, steps=tuple(fallen(step) for step in plan.steps))


def _kind(step: Step) -> Hashable:
    """What a block has in common with those that it is proven for."""
    return step.kind, step.spec, step.reason, step.target


def _planned(step: Step) -> Step:
    """As it was before the weights were loaded: a plan may say what became of it."""
    said, fallen, _ = step.reason.partition(_FALLEN)
    return replace(step, outcome="replaced", target=FOLDED, reason=said) if fallen else step


def _match(item: EngineSite, packs: Sequence[Pack], checkpoint: object) -> Match | Miss | None:
    if item.swapped:
        return None
    return match_rules(Surveyed(item.site, item.reading, item.unread), packs, checkpoint)


def _decide(
    item: EngineSite,
    match: Match | Miss | None,
    targets: Mapping[str, str],
    hindrance: str | None,
    config: VllmConfig,
) -> Step:
    path, kind = item.site.path, item.site.kind
    if match is None:
        return Step(path, kind, "kept", _kept_whole(item, item.remark))
    if isinstance(match, Miss):
        if item.whole or item.bare:
            return Step(path, kind, "kept", _kept_whole(item, match.reason if item.whole else ""))
        return Step(path, kind, "missed", match.reason)
    rule, spec = match.rule, match.reading.spec
    wanted = targets[rule]
    if item.whole:
        reason = _not_anew(item, config, wanted, hindrance)
        if reason is None:
            return Step(path, kind, "replaced", _with_crossover(_told_of(item), item, config), rule, FOLDED, spec)
        return Step(path, kind, "kept", _kept_whole(item, reason), rule, None, spec)
    if wanted not in (AUTO, LAYER, FOLDED):
        return Step(path, kind, "kept", f"the target {wanted} is none that engines take", rule, None, spec)
    reason = hindrance or _not_rebuilt(item, config)
    if reason is not None:
        return Step(path, kind, "refused", reason, rule, LAYER if wanted == AUTO else wanted, spec)
    said = _told_of(item)
    # On a CPU vLLM's layer was measured to be slower than what stands beside its block without it.
    if wanted == FOLDED or (wanted == AUTO and (current_platform.is_cuda() or item.pair is not None)):
        reason = _not_folded(item, config)
        if reason is None:
            return Step(path, kind, "replaced", _with_crossover(said, item, config), rule, FOLDED, spec)
        said = f"{said} · not folded: {reason}"
    if rounds_float32(config):
        return Step(path, kind, "refused", f"{ROUNDED} · {said}", rule, LAYER, spec)
    return Step(path, kind, "replaced", said, rule, LAYER, spec)


def _not_anew(item: EngineSite, config: VllmConfig, wanted: str, hindrance: str | None) -> str | None:
    """Why a block that vLLM's layer computes all of stays; "" where nothing else was asked, None if it goes."""
    assert item.reading is not None
    cuda = current_platform.is_cuda()
    if wanted not in (AUTO, FOLDED) or not (cuda or (wanted == FOLDED and item.fused)):
        return ""
    reason = hindrance or _not_rebuilt(item, config) or _not_folded(item, config)
    return reason or (_not_timed(item, config) if wanted == AUTO else None)


def _not_rebuilt(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that was read can't be rebuilt, as it stands in the model and as it is stored and served."""
    if item.elsewhere is not None:
        return f"a part of it is in the model as {item.elsewhere} too"
    return unserved(item, config) or unfit(item, config)


def _not_folded(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that can be rebuilt can't be folded."""
    reason = unfolded(item, config)
    if reason is not None:
        return reason
    return not_on_kernels(item, config) if current_platform.is_cuda() else not_folded(item)


def _not_timed(item: EngineSite, config: VllmConfig) -> str | None:
    """Why it isn't known that this library's kernels are no slower than vLLM's layer."""
    assert config.model_config is not None
    terms = terms_in_engine(item)
    if timed_against_vllm(terms, config.model_config.dtype, torch.cuda.get_device_name()):
        return None
    return (
        f"this library's kernels weren't timed against vLLM's at its size ({shape_name(terms)}) on this GPU; "
        "--target folded has them all the same"
    )


def _told_of(item: EngineSite) -> str:
    assert item.reading is not None
    said = item.reading.spec.sentence()
    return f"{said} · {', '.join(item.stored)}" if item.stored else said


def _with_crossover(said: str, item: EngineSite, config: VllmConfig) -> str:
    if not current_platform.is_cuda():
        return said
    assert config.model_config is not None
    more = told(terms_in_engine(item), config.model_config.dtype)
    return said if more is None else f"{said} · {more}"


def rounds_float32(config: VllmConfig) -> bool:
    """Whether vLLM's layer multiplies float32 with ten bits of mantissa: Triton does unless it is told otherwise."""
    assert config.model_config is not None
    wide = config.model_config.dtype == torch.float32
    return wide and current_platform.is_cuda() and os.environ.get(_EXACT[0]) != _EXACT[1]


def _kept_whole(item: EngineSite, reason: str) -> str:
    """What a plan says of a block that vLLM's layer computes all of and that stays as it is, with the ``reason``."""
    if item.fused:
        said = "already fused"
    elif not item.remark:
        said = "vLLM's own layer, with no shared expert in its block or added to it"
    else:
        said = f"vLLM's own layer, with no shared expert in its block; {item.remark}"
    return f"{said} · not folded: {reason}" if reason else said


def reads_fused(target: str) -> bool:
    """Whether blocks that vLLM has fused may be folded all the same by this ``target``, and so must be read."""
    return target == FOLDED or (target == AUTO and current_platform.is_cuda())


def _check_same(wanted: Plan, plan: Plan, file: str, *, whole: bool) -> None:
    if wanted.model != plan.model:
        raise PlanError(f"{file}: the plan is for {wanted.model}, the engine builds {plan.model}")
    wanted.check_origin(plan.checkpoint, plan.model)
    wanted.warn_of_versions()
    wanted = replace(wanted, steps=tuple(_planned(step) for step in wanted.steps))
    if wanted.fingerprint == plan.fingerprint:
        return
    after = {step.path: step for step in plan.steps}
    before = {step.path: step for step in wanted.steps if whole or step.path in after}
    if not whole and before == after:
        return
    path = next((path for path in {**before, **after} if before.get(path) != after.get(path)), "the order of its sites")
    had, has = (_told(steps.get(path)) for steps in (before, after))
    raise PlanError(f"{file}: the plan no longer fits: at {path} it says {had}, but now it would be {has}")


def _told(step: Step | None) -> str:
    return "nothing" if step is None else f"{step.outcome} ({step.reason})"
