"""One model's surgery in one process: planned when it is built, watched while it loads, carried out before it runs.

The blocks are exchanged between loading and vLLM's laying out of weights for its kernels. Until then the model is the
one its author wrote, so its own loader fills it, whatever names the checkpoint has, and no name ever has to be mapped;
and the experts that vLLM's layer already holds stay where they are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.platforms import current_platform

from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.blocks import EngineBlock
from moe_surgery.engine.model.building import Built, build
from moe_surgery.engine.model.compiled import compile_ahead, warm_kernels
from moe_surgery.engine.model.crossover import told
from moe_surgery.engine.model.former import Former
from moe_surgery.engine.model.kernel_block import KernelBlock, terms_in_engine
from moe_surgery.engine.model.layer_book import LayerBook, Snapshot
from moe_surgery.engine.model.ledger import Ledger
from moe_surgery.engine.model.load import name_of
from moe_surgery.engine.model.observing import observe
from moe_surgery.engine.model.planning import FOLDED, fallen_back, make_engine_plan, reads_fused, settled
from moe_surgery.engine.model.proving import Exam, Proof, examine, prepare, to_prove
from moe_surgery.engine.model.sites import EngineSite, check_unchanged, survey
from moe_surgery.engine.model.two_ways import TwoWays
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import LedgerError, ProofError, SurgeryError, UnsupportedError
from moe_surgery.installed.cards import cards
from moe_surgery.planning.plan import Plan
from moe_surgery.report.outcomes import Step
from moe_surgery.report.report import Report

if TYPE_CHECKING:
    from moe_surgery.kernels.ahead import Compilers

KEY = "moe_surgery"
THREADS = min(8, os.cpu_count() or 1)
"""How many blocks' probes are made at a time."""


class Surgery:
    """The operation on one model that ``initialize_model`` has just returned. ``before`` is the book before it."""

    def __init__(
        self,
        model: nn.Module,
        config: VllmConfig,
        orders: Orders,
        before: Snapshot,
        ranks: Ranks,
        compilers: Compilers | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.config, self.orders, self.before, self.ranks = model, config, orders, before, ranks
        self.architecture = name_of(model, config.model_config)
        if not isinstance(config.additional_config, dict):
            raise UnsupportedError(
                "the engine's additional_config is no dictionary, so compiled graphs can't be told apart"
            )
        given = None if orders.plan is None else Plan.load(orders.plan)
        target = orders.target if given is None else given.target
        sites = settled(survey(model, fused=reads_fused(target)), config)
        self.plan = make_engine_plan(self.architecture, model, sites, config, orders, given)
        replaced = {step.path for step in self.plan.steps if step.outcome == "replaced"}
        self.items: dict[str, EngineSite] = {item.site.path: item for item in sites if item.site.path in replaced}
        folds = {step.path for step in self.plan.steps if step.target == FOLDED} if current_platform.is_cuda() else ()
        folded = (item for path, item in self.items.items() if path in folds)
        self._compiled = compile_ahead(folded, config, compilers)
        self._warm = False
        self.exams: dict[str, Proof] = {}
        self.ledger: str | None = None
        self.names: frozenset[str] = frozenset()
        self.exchanged: dict[str, nn.Module] = {}
        self._formers: dict[str, Former] = {}
        self.done = False
        self._ledger = Ledger({})
        self.seconds = time.perf_counter() - self.started

    def watch(self) -> None:
        """Write down what is loaded into the planned blocks from now on."""
        self._ledger = Ledger({path: part for item in self.items.values() for path, part in item.places().items()})
        load: Callable[..., Any] = self.model.load_weights  # type: ignore[assignment]

        def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
            vars(self.model).pop("load_weights", None)
            try:
                return load(self._ledger.stream(weights), *args, **kwargs)
            finally:
                self._ledger.remove()

        self.model.load_weights = load_weights  # type: ignore[assignment]

    def operate(self) -> None:
        """Exchange the planned blocks of the loaded model, and have the chosen ones proven by and by."""
        started = time.perf_counter()
        vars(self.model).pop("load_weights", None)
        if self._ledger.opened:
            self.ledger = self._ledger.close(self.ranks if self.config.parallel_config.enable_expert_parallel else None)
        elif self.items and self.config.load_config.load_format != "dummy":
            raise LedgerError(
                "the weights were not loaded through the model's load_weights, so nothing is known of them"
            )
        self._ledger.remove()
        self.names = self._ledger.names
        self._ledger = Ledger({})  # the other holds the parameters that are about to go
        self.exchange()
        self._mark_configs()
        self.done = True
        self.seconds += time.perf_counter() - started

    def exchange(self) -> None:
        """Exchange the blocks of ``items``, whose weights are loaded."""
        book = LayerBook(self.config)
        exchanged: dict[nn.Module, nn.Module] = {}
        pool = ThreadPoolExecutor(THREADS)
        with set_current_vllm_config(self.config), torch.no_grad():
            for item in self.items.values():  # all before any: exchanging may change what blocks have in common
                check_unchanged(item)
            rehearsed = self._rehearsed(pool)
            steps = self._steps()
            chosen = self._chosen()
            for path, item in self.items.items():
                fold = steps[path].target == FOLDED
                if path in chosen:
                    self.exams[path] = self._exam(item, rehearsed.get(path), pool, fold=fold)
                if item.whole and current_platform.is_cuda():
                    self._formers[path] = Former.of(item)
                built = build(item, book, fold=fold)
                built.block.rule = steps[path].rule
                exchanged |= self._exchange(item, built)
                if path in chosen:
                    whole, runner = built.whole(item), _runner(built.block)
                    judge = partial(self._judge_at_once, path)
                    examine(self.exams[path], whole, runner, self.config, self._ready_kernels, judge)
        pool.shutdown(wait=False)  # what was asked of it is waited for where it is needed
        relist(self.model, exchanged)
        book.arrange(self.model, self.before)
        book.check(self.model, self.before)
        self.items.clear()

    def _ready_kernels(self) -> None:
        """Once, all that the new blocks may launch, side by side: the proofs would wait for one after the other."""
        if not self._warm:
            self._compiled()
            warm_kernels(self.model)
            self._warm = True

    def _steps(self) -> dict[str, Step]:
        """Those of the blocks that are exchanged."""
        return {step.path: step for step in self.plan.steps if step.path in self.items}

    def _chosen(self) -> tuple[str, ...]:
        """The paths of the blocks to prove."""
        return to_prove(self._steps().values(), everything=self.orders.prove == "all")

    def _exam(self, item: EngineSite, rehearsed: Exam | None, pool: Executor, *, fold: bool) -> Proof:
        """The proof of a block; folded weights are computed with in another way, however they are stored."""
        if item.stored and not fold:
            return observe(item, self.ranks)
        exam = rehearsed or prepare(item, self.ranks, pool)
        assert self.config.model_config is not None
        two = bool(item.stored) and told(terms_in_engine(item), self.config.model_config.dtype) is not None
        return TwoWays(exam, observe(item, self.ranks)) if two else exam

    def _rehearsed(self, pool: Executor) -> dict[str, Exam]:
        """The exams of blocks folded behind vLLM's own router: only its loaded weights tell whether any can be.

        Quantised blocks that can't be proven so are left to vLLM's layer, for which there is another proof, and those
        that are that layer already stay as they are.
        """
        steps, exams = self._steps(), {}
        for path in self._chosen():
            item, step = self.items[path], steps[path]
            elsewise = item.stored or item.whole
            if step.target == FOLDED and elsewise and step.spec is not None and step.spec.router.own:
                exams[path] = prepare(item, self.ranks, pool)
        reasons = {path: reason for path, exam in exams.items() if (reason := exam.rehearse()) is not None}
        self.plan = fallen_back(self.plan, reasons, {path for path, item in self.items.items() if item.whole})
        kept = {step.path for step in self.plan.steps if step.outcome == "kept"}
        self.items = {path: item for path, item in self.items.items() if path not in kept}
        steps = self._steps()
        return {path: exam for path, exam in exams.items() if path in steps and steps[path].target == FOLDED}

    def _mark_configs(self) -> None:
        """Compiled graphs are cached under a hash of the config, in which the module tree has no part: add the plan.

        The operators that its blocks are in graphs, too.
        A model inside a model was built with a copy of the config, which its compiled parts hold.
        """
        schemas = {module.schema for module in self.model.modules() if isinstance(module, KernelBlock)}
        held = [value for module in self.model.modules() for value in vars(module).values()]
        for config in (self.config, *(value for value in held if isinstance(value, VllmConfig))):
            assert isinstance(config.additional_config, dict)  # as the engine's, of which all are copies
            if self.exchanged:
                config.additional_config[KEY] = " ".join([self.plan.fingerprint, *sorted(schemas)])
            else:
                config.additional_config.pop(KEY, None)

    def _exchange(self, item: EngineSite, built: Built) -> dict[nn.Module, nn.Module]:
        """Put what was built into the model; what took the place of what is returned."""
        exchanged, new = {}, built.modules(item)
        for path, module in new.items():
            parent, _, name = path.rpartition(".")
            exchanged[item.places()[path]] = module
            self.model.get_submodule(parent).register_module(name, module)
            record_metadata_for_reloading(module)
        if item.layer is not None:  # vLLM lays weights out in the order of the tree, and the experts' are asked then
            children, name = item.layer.module._modules, item.site.path.rpartition(".")[2]
            children[name] = children.pop(name)
        self.exchanged |= new
        # vLLM's parameters and layers refer to each other, and a collection may be long in coming for this much memory.
        kept = {id(parameter) for module in new.values() for parameter in module.parameters()}
        for parameter in item.block.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)
        runner = _runner(built.block)
        return exchanged | {module: runner for module in item.block.modules() if isinstance(module, MoERunner)}

    def judge(self) -> None:
        """Raise :class:`ProofError` unless every chosen block was proven."""
        for path in self.exams:
            self._judge(path)

    def _judge(self, path: str) -> None:
        """Raise :class:`ProofError` if the proof of a block failed or did not take place."""
        verdict = self.exams[path].verdict
        if verdict is None or not verdict.passed:
            reason = "its experts were never laid out, so it was not proven" if verdict is None else verdict.reason
            error = ProofError(f"{path}: {reason}")
            error.report = self._report().but(exit_code=error.exit_code)
            raise error

    def _judge_at_once(self, path: str) -> None:
        """As :meth:`_judge`, but that a former block may come back if its weights let nothing be proven."""
        verdict = self.exams[path].verdict
        if path not in self._formers or verdict is None or not verdict.powerless:
            self._judge(path)

    def _put_back(self) -> None:
        """Let former blocks be where weights let nothing be proven, and all of their kind, as not all are asked."""
        verdicts = {path: self.exams[path].verdict for path in self._formers if path in self.exams}
        reasons = {path: verdict.reason for path, verdict in verdicts.items() if verdict and verdict.powerless}
        before = {step.path: step for step in self.plan.steps}
        self.plan = fallen_back(self.plan, reasons, self._formers)
        gone = [step.path for step in self.plan.steps if step != before[step.path]]
        for path in gone:
            relist(self.model, self._formers[path].put_back(self.model, self.config))
            self.exams.pop(path, None)
            del self.exchanged[path]
        if gone:
            self._mark_configs()

    def finish(self) -> Report:
        """Call once the weights are laid out. Raises :class:`ProofError` if a proof did not take place."""
        if not self.done:
            raise SurgeryError("the model was loaded in a way that bypassed the surgery")
        self._put_back()
        self.judge()
        started = time.perf_counter()
        warm_kernels(self.model)
        self.seconds += time.perf_counter() - started
        return self._report()

    def _report(self) -> Report:
        verdicts = {path: exam.verdict for path, exam in self.exams.items()}
        steps = tuple(
            replace(step, verdict=verdicts[step.path]) if verdicts.get(step.path) else step for step in self.plan.steps
        )
        seconds = round(self.seconds + sum(exam.seconds for exam in self.exams.values()), 3)
        made_with = self.plan.versions | cards(self.model)
        return Report(self.plan.model, "applied", steps, self.plan.fingerprint, made_with, seconds)


def relist(model: nn.Module, exchanged: Mapping[nn.Module, nn.Module]) -> None:
    """Models keep lists of their MoE layers beside the tree: put what took a module's place into them, too."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, list):
                for place, member in enumerate(value):
                    if isinstance(member, nn.Module) and member in exchanged:
                        value[place] = exchanged[member]


def _runner(block: EngineBlock) -> MoERunner:
    return next(module for module in block.modules() if isinstance(module, MoERunner))
