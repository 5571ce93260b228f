"""The audit: every MoE block that vLLM built is held against what its checkpoint says, and nothing is replaced.

The truth comes from two sources that vLLM has no part in: what the block computes is read from transformers' own block,
and its weights are loaded from the checkpoint's files by transformers' own rules. So a formula that vLLM gets wrong is
found, and a weight that it loads wrong. One block's weights are held at a time. All ranks of tensor parallelism make up
the same truth, and ask the same questions in step.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.audit_truth import Incomparable, Truth, truth_of
from moe_surgery.engine.model.counterparts import pair
from moe_surgery.engine.model.load import name_of
from moe_surgery.engine.model.proving import SEED, asker
from moe_surgery.engine.model.sites import engine_sites
from moe_surgery.engine.orders import ENGINE_PLAN
from moe_surgery.errors import ModelError, ProofError
from moe_surgery.installed.cards import cards
from moe_surgery.installed.versions import versions
from moe_surgery.models.site import Site
from moe_surgery.planning.survey import Surveyed
from moe_surgery.prove import ground as grounds
from moe_surgery.prove.asking import Block, Misconduct
from moe_surgery.prove.judging import beyond
from moe_surgery.prove.limits import KERNELS, SURELY, of_kernels
from moe_surgery.prove.naming import NEARER, answers_of, contrasts, named
from moe_surgery.prove.proof import FEWEST_MUTANTS, prove_swapped
from moe_surgery.report.outcomes import Outcomes, Step
from moe_surgery.report.terminal import sentence
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import gather

_PLAIN = (UnquantizedFusedMoEMethod, UnquantizedLinearMethod)


def audit(model: nn.Module, config: VllmConfig, model_config: ModelConfig, ranks: Ranks) -> Outcomes:
    """What became of every MoE block of a loaded ``model``: right, wrong, or not comparable and why."""
    started = time.perf_counter()
    sites = engine_sites(model)
    try:
        truth: Truth | str = truth_of(config, model_config)
    except (ModelError, Incomparable) as error:
        truth = str(error)
    counterparts: dict[str, str] = {}
    if isinstance(truth, Truth):
        counterparts = pair(model, [site.path for site in sites], truth.weights, list(truth.sites))
    steps = []
    for site in sites:
        if site.path not in counterparts and not _routed(site.module) and isinstance(truth, Truth):
            continue  # transformers has nothing there, and vLLM no routed layer: it only looks like a block
        ranks.meet(f"where {site.path} is audited")
        try:
            if not isinstance(truth, Truth):
                raise Incomparable(truth)
            steps.append(_step(site, truth, counterparts, config, ranks))
        except (ModelError, Incomparable) as error:
            steps.append(Step(site.path, site.kind, "not comparable", str(error)))
    if isinstance(truth, Truth) and counterparts and config.parallel_config.pipeline_parallel_size == 1:
        left = [item.site for path, item in truth.sites.items() if path not in counterparts.values()]
        reason = "transformers has a block here, and nothing in vLLM's model has its weights"
        steps += [Step(site.path, site.kind, "not comparable", reason) for site in left]
    return Outcomes(
        model=f"{ENGINE_PLAN}{name_of(model, config.model_config)}",
        done="audited",
        steps=tuple(steps),
        fingerprint="",
        versions=versions() | cards(model),
        seconds=round(time.perf_counter() - started, 3),
        exit_code=ProofError.exit_code if any(step.outcome == "wrong" for step in steps) else 0,
    )


def fault_of(report: Outcomes) -> ProofError | None:
    """The error that a wrong block is."""
    if not report.wrong:
        return None
    more = f" (and {len(report.wrong) - 1} more)" if len(report.wrong) > 1 else ""
    error = ProofError(f"{report.wrong[0].path} is wrong{more}: {report.wrong[0].reason}")
    error.report = report
    return error


def told(report: Outcomes) -> str:
    """An audit in one line."""
    return f"audited {report.model.removeprefix(ENGINE_PLAN)}: {sentence(report)}"


def _step(site: Site, truth: Truth, counterparts: Mapping[str, str], config: VllmConfig, ranks: Ranks) -> Step:
    if (scheme := _quantised(site, truth, counterparts.get(site.path))) is not None:
        raise Incomparable(scheme)
    if site.path not in counterparts:
        raise Incomparable("no block of transformers' model has its weights")
    theirs = truth.sites[counterparts[site.path]]
    if theirs.reading is None:
        raise Incomparable(f"transformers' block, {theirs.site.kind}, can't be read: {theirs.unread}")
    block = _askable(site)
    runner = _routed(site.module)
    spec, device = theirs.reading.spec, next(site.module.parameters()).device
    if (difference := _elsewhere(site, spec, truth, theirs) or _made_up_for(runner)) is not None:
        raise Incomparable(difference)
    with truth.weights.loaded(theirs.site.path, str(device)) as loaded:
        tensors = gather(loaded, theirs.reading.layout)
        spec = _rounded_anyhow(spec)
        ground = grounds.survey(spec, tensors, SEED, ranks.size)
    del loaded
    with set_current_vllm_config(config):
        ask = asker(site.path, block, runner, config, ranks)
        step = _judged(site, ask, spec, ground)
    ranks.stand()  # or the step is about what another rank didn't do
    return step


def _judged(site: Site, ask: Block, spec: MoESpec, ground: grounds.Ground | str) -> Step:
    if isinstance(ground, str):
        return Step(site.path, site.kind, "not comparable", ground, spec=spec)
    ground = of_kernels(ground, torch.finfo(ground.probes.x.dtype).eps)
    try:
        found = contrasts(answers_of(ask, ground), ground)
    except Misconduct as fault:
        raise Incomparable(f"vLLM's block {fault}, asked by itself") from fault
    verdict = prove_swapped(ask, ground)
    off = max(beyond([family.reading_error for family in verdict.families], ground))
    told = all(contrast.ratio >= NEARER for contrast in found) and len(found) >= FEWEST_MUTANTS
    reason = verdict.reason.replace("the swapped block is not what the spec says: it is", "it is")
    # A proof must surely have noticed each mutant; here the answers are known, and must only be unlike each.
    if verdict.passed or (off <= KERNELS and told and not ground.unvisited):
        verdict = replace(verdict, passed=True, powerless=False)
        return Step(site.path, site.kind, "right", spec.sentence(), spec=spec, verdict=verdict)
    if off > 1 and (off > SURELY or any(contrast.same for contrast in found)):
        name = named(found)
        return Step(site.path, site.kind, "wrong", f"{name}: {reason}" if name else reason, spec=spec, verdict=verdict)
    return Step(site.path, site.kind, "not comparable", reason, spec=spec, verdict=verdict)


def _routed(block: nn.Module) -> MoERunner | None:
    """The first routed layer of vLLM's in a block."""
    return next((module for module in block.modules() if isinstance(module, MoERunner)), None)


def _quantised(site: Site, truth: Truth, theirs: str | None) -> str | None:
    """By what a block's weights are quantised, if they are: then what is right is another question."""
    scheme = truth.weights.opened.quantisation
    if scheme is not None and theirs is not None and scheme.covers(theirs):
        return f"its weights are {scheme.scheme}"
    for module in site.module.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not isinstance(method, _PLAIN):
            return f"vLLM quantises its weights ({type(method).__name__})"
    return None


def _askable(site: Site) -> Block:
    """The block as a function of tokens alone, which takes [T, H] as vLLM's do, and never its caller's own tensor."""
    module = site.module
    needed = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) != 1:
        raise Incomparable(f"vLLM's block takes {', '.join(needed) or 'nothing'}, not tokens alone")
    whole = type(module).__module__.split(".")[0] in ("transformers", "transformers_modules")

    def ask(x: torch.Tensor) -> torch.Tensor:
        given = x.clone()
        out: Any = module(given if whole else given.reshape(-1, given.shape[-1]))
        out = out[0] if isinstance(out, tuple) else out
        return out if whole else out.reshape(x.shape)

    return ask


def _elsewhere(site: Site, spec: MoESpec, truth: Truth, theirs: Surveyed) -> str | None:
    """What stands in one of the two blocks and beside the other."""
    mine = _has_shared(site.module)
    if mine == (spec.shared is not None):
        return None
    parent = truth.weights.opened.module.get_submodule(theirs.site.path.rpartition(".")[0])
    if mine and _beside(parent, theirs.site.module):
        return "vLLM's block has the shared expert inside, transformers' beside it"
    return None


def _made_up_for(runner: MoERunner | None) -> str | None:
    """What a block's decoder layer has to do with its output before it is the one that was meant."""
    if runner is None or runner.shared_experts is None or runner.routed_scaling_factor == 1.0:
        return None
    if runner.moe_config.in_dtype != torch.float16:
        return None
    scale = runner.routed_scaling_factor
    return (
        f"in float16 vLLM's block returns its output divided by {scale:g}, which its decoder layer has to make up for"
    )


def _has_shared(block: nn.Module) -> bool:
    return any(isinstance(module, MoERunner) and module.shared_experts is not None for module in block.modules())


def _beside(parent: nn.Module, block: nn.Module) -> bool:
    return any(name.startswith("share") for name, child in parent.named_children() if child is not block)


def _rounded_anyhow(spec: MoESpec) -> MoESpec:
    """The spec with a router that may round wherever the dtype lets it: where vLLM's does, is not on trial."""
    router = replace(
        spec.router,
        logits_dtype="native",
        weights_dtype="native",
        scores_dtype="native",
        ranked_dtype="native",
        cap_dtype="native",
    )
    return replace(spec, router=router)
