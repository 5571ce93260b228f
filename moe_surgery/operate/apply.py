"""Carrying a plan out: build and prove every block beside the model, then exchange all of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_surgery.answers import output_of
from moe_surgery.errors import ExpectationError, ProofError, SurgeryError
from moe_surgery.installed.cards import cards
from moe_surgery.installed.versions import versions
from moe_surgery.operate.ahead import ProbesAhead
from moe_surgery.operate.building import Double, Unanswerable, built, gathered, take_over, uncounted
from moe_surgery.operate.fitting import check_fits
from moe_surgery.operate.interrupts import without_interrupts
from moe_surgery.operate.model_check import WholeModel
from moe_surgery.operate.reading_again import read_again
from moe_surgery.operate.settings import Progress, Settings
from moe_surgery.operate.transaction import Swap, Transaction
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.survey import Surveyed
from moe_surgery.prove.asking import NUMBERS
from moe_surgery.prove.own_tokens import disagreement
from moe_surgery.prove.probe import Probes, make_probes
from moe_surgery.prove.results import prove_block
from moe_surgery.prove.verdict import Verdict
from moe_surgery.read.reading import Reading
from moe_surgery.read.record.state import unwritten
from moe_surgery.report.outcomes import Done, Memory, Step
from moe_surgery.report.report import Report
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import StandingBlock, Target
from moe_surgery.targets.convention import Convention
from moe_surgery.targets.folded.ahead import KernelsAhead
from moe_surgery.weights.tensors import BlockTensors


class Operation:
    """One plan on one model: ``apply`` carries it out, ``verify`` proves what it would do."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        sites: Sequence[Surveyed],
        targets: Callable[[str], Target],
        settings: Settings,
        kernels: KernelsAhead,
    ) -> None:
        self.model, self.plan, self.settings, self.kernels = model, plan, settings, kernels
        named = cache(targets)
        self.targets = {step.path: named(step.target) for step in plan.steps if step.target is not None}
        self.rules = {step.path: step.rule for step in plan.steps}
        self.readings = check_fits(plan, sites)
        self.verdicts: dict[str, Verdict] = {}
        self.refused: dict[str, str] = {}
        self.prepared: set[MoESpec] = set()
        self.wrote: dict[str, list[dict[tuple[str, str], Any]]] = {}  # attributes, in each call of the model's
        self.again: dict[str, Reading] = {}  # as the model calls them
        self.whole: WholeModel | None = None
        self.exchanged: Transaction | None = None
        folded = {self.readings[path].spec for path, target in self.targets.items() if target.name == "folded"}
        kernels.begin(folded, next(model.parameters()).dtype, NUMBERS)
        self.started = time.perf_counter()
        self.read = self.proved = 0.0

    def verify(self) -> Report:
        """The proof alone. Every block is built, proven and thrown away; the model is left as it was."""
        with uncounted(self.model, self.readings), self._ahead() as ahead:
            for path in self._paths():
                self._proven(path, ahead)
        self._check_counts("verified")
        failed = any(not verdict.passed and not verdict.powerless for verdict in self.verdicts.values())
        return self._report("verified", exit_code=ProofError.exit_code if failed else 0)

    def apply(self) -> Report:
        """Build and prove every block, then exchange all of those that can be proven.

        Raises :class:`ProofError` with the report if a block is wrong, or the model around the new blocks does anything
        else than before, and :class:`ExpectationError` if fewer can be proven than the settings ask for.
        """
        try:
            with uncounted(self.model, self.readings):
                return self._applied()
        except BaseException:  # an interrupt just before the end too: nobody has the report to undo it by
            if self.exchanged is not None and self.exchanged.committed:
                self.exchanged.undo()
            raise

    def _applied(self) -> Report:
        wanted = self.settings.model_check
        if wanted is not False and self.readings:
            self.whole = self._run_before(None if wanted is True else wanted)
            self.again = read_again(self.whole, self.targets)
            if self.again:
                self.readings |= self.again
                self.whole = self._run_before(None if wanted is True else wanted)
            for path, call in self.whole.unread.items():
                self.refused[path] = f"the model calls it with a value for {call.argument}, which it was not read with"
        undoable = self.settings.undoable
        blocks: dict[str, StandingBlock] = {}
        with self._ahead() as ahead:
            for path in self._paths():
                new = self._accepted(path, ahead)
                if new is not None:
                    blocks[path] = new if undoable else Double(new, self.wrote.pop(path, ()))
        self._check_counts("rolled back")
        self.proved = time.perf_counter() - self.started
        transaction = self._exchanged(blocks)
        if not undoable:
            transaction.undo()
            transaction = self._exchange_one_by_one(tuple(blocks))
        for swap in transaction.swaps:
            if swap.old is not None:  # whatever the new block wrote while it was tried
                take_over(swap.new, swap.old, self.readings[swap.path])
        memory = Memory(
            moved=sum(swap.new.moved_bytes for swap in transaction.swaps),
            new=sum(swap.new.new_bytes for swap in transaction.swaps),
            kept=sum(swap.kept_bytes for swap in transaction.swaps),
        )
        return self._report("applied", memory=memory, transaction=transaction)

    def _run_before(self, given: Mapping[str, Any] | None) -> WholeModel:
        """The model run with its old blocks, as far as it can be, with the arguments ``given``."""
        hidden = next(iter(self.readings.values())).spec.hidden
        callings = {path: reading.calling for path, reading in self.readings.items()}
        whole = WholeModel(self.model, tuple(self.readings), hidden, given, callings)
        whole.before()
        return whole

    def _exchanged(self, blocks: Mapping[str, StandingBlock]) -> Transaction:
        """The blocks in their places, and the model around them checked; :meth:`apply` takes back what fails."""
        transaction = Transaction(self.model, [Swap.at(self.model, path, new) for path, new in blocks.items()])
        self.exchanged = transaction
        transaction.commit()
        if self.whole is not None:
            bound = max((self.verdicts[path].bound for path in blocks), default=0.0)
            difference = self.whole.after(blocks, bound)
            if difference is not None:
                raise self._failed(f"the whole model differs: {difference}")
        return transaction

    def _exchange_one_by_one(self, paths: Sequence[str]) -> Transaction:
        """Rebuild each proven block and give its original up before the next: one block of extra memory at most.

        Interrupts wait until the end, since what is given up can't be put back.
        """
        done: list[Swap] = []
        with without_interrupts():
            for path in paths:
                try:
                    swap = Swap.at(self.model, path, self._build(path))
                except Exception as error:
                    if not done:
                        raise
                    raise SurgeryError(
                        f"{path}: could not be built the second time ({error}); {len(done)} blocks before it are "
                        "replaced, proven and can't be undone (undoable=False), the others are as they were"
                    ) from error
                swap.place(swap.new)
                swap.old = None
                done.append(swap)
            transaction = Transaction(self.model, done)
            transaction.commit()
        return transaction

    def _ahead(self) -> ProbesAhead:
        """Probes of blocks whose weights can be had without a copy, and whose router isn't made up for the proof."""

        def make(path: str) -> Probes | None:
            reading = self.readings[path]
            if reading.layout.packed is None or reading.spec.at == "experts" or reading.spec.router.own:
                return None
            tensors = gathered(self.model.get_submodule(path), reading)
            if not bool(tensors.router.isfinite().all()):
                return None  # no token can be steered by it; the proof says so
            return make_probes(reading.spec, tensors.router, self.settings.seed, tensors)

        return ProbesAhead(tuple(self.readings), make)

    def _paths(self) -> Iterable[str]:
        paths, progress = list(self.readings), self.settings.progress
        return paths if progress is None else _reported(paths, progress)

    def _build(self, path: str, tensors: BlockTensors | None = None) -> StandingBlock:
        """The block for a site, which answers for the old one. Raises :class:`Unanswerable` if it can't."""
        block, reading = self.model.get_submodule(path), self.readings[path]
        if tensors is None:
            tensors = gathered(block, reading)
        new = built(block, reading, tensors, self.targets[path], path)
        new.rule = self.rules[path]
        return new

    def _proven(self, path: str, ahead: ProbesAhead) -> StandingBlock | None:
        """A block that was built and judged; None for a site that can't be replaced, which is then refused."""
        block, probes = self.model.get_submodule(path), ahead.of(path)
        if path in self.refused:
            return None
        reading = self.readings[path]
        with torch.inference_mode(False), torch.no_grad():
            tensors = gathered(block, reading)
            try:
                new = self._build(path, tensors)
                name = None if self.whole is None else self.whole.inner.unanswered(path, new)
                if name is not None:
                    raise Unanswerable(f"the model calls its {name} past it, which can't be called in a swapped block")
            except Unanswerable as error:
                self.refused[path] = str(error)
                return None
            if reading.spec not in self.prepared:
                self.prepared.add(reading.spec)
                self.kernels.wait()
                with suppress(Exception):  # what doesn't compile is told where it is called
                    new.prepare(NUMBERS)
            settings = self.settings
            convention = new.convention or Convention.of(reading.spec, reading.calling, reading.results, tensors)
            seed, margin = settings.seed, settings.margin
            with unwritten(block):
                verdict = prove_block(
                    block, new, reading.spec, tensors, convention, seed=seed, margin=margin, probes=probes
                )
            self.verdicts[path] = verdict
            if verdict.powerless:
                self.refused[path] = f"can't be proven: {verdict.reason}"
                return None
            if verdict.passed and self.whole is not None:
                self._ask_as_the_model_does(path, new, tensors, self.whole)
        return new

    def _ask_as_the_model_does(self, path: str, new: StandingBlock, tensors: BlockTensors, whole: WholeModel) -> None:
        """Ask a new block what the model asked the old one. Raises :class:`ProofError` if the answers differ."""
        reading = self.readings[path]
        for called in whole.heard(path, reading.results):
            try:
                heard = called.by_role(reading.calling, reading.spec.at)
                with new.unwritten():
                    answer = output_of(reading.results, new(*reading.calling.placed(heard.roles())))
                    if not self.settings.undoable:
                        self.wrote.setdefault(path, []).append(new.written())
            except Exception as error:
                raise self._failed(f"{path}: {error} (on what the model gives it)") from error
            apart, fault = disagreement(heard, answer, reading.spec, tensors, self.verdicts[path].bound)
            if fault is not None:
                raise self._failed(f"{path}: {fault}")
            whole.saw(apart)

    def _accepted(self, path: str, ahead: ProbesAhead) -> StandingBlock | None:
        new = self._proven(path, ahead)
        if new is not None and not self.verdicts[path].passed:
            raise self._failed(f"{path}: {self.verdicts[path].reason}")
        return new

    def _failed(self, reason: str) -> SurgeryError:
        report = self._report("rolled back", exit_code=ProofError.exit_code)
        return ProofError(reason).with_report(report)

    def _check_counts(self, done: Done) -> None:
        """Raise :class:`ExpectationError` if the proofs have left fewer blocks than were asked for."""
        settings, left = self.settings, len(self.readings) - len(self.refused)
        reason = None
        if settings.expect is not None and left != settings.expect and self.refused:
            reason = f"expected {settings.expect} sites to replace, {left} can be"
        elif settings.strict and self.refused:
            reason = (
                f"strict: {len(self.refused)} sites are refused" if len(self.refused) > 1 else "strict: 1 is refused"
            )
        if reason is not None:
            listed = "; ".join(f"{path}: {why}" for path, why in self.refused.items())
            report = self._report(done, exit_code=ExpectationError.exit_code)
            raise ExpectationError(f"{reason}: {listed}").with_report(report)

    def _report(self, done: Done, exit_code: int = 0, **rest: object) -> Report:
        steps = tuple(self._step(step, done) for step in self.plan.steps)
        seconds = time.perf_counter() - self.started
        phases = {"read": self.read, "prove": self.proved or seconds}
        if self.proved and done == "applied":
            phases["exchange"] = seconds - self.proved
        return Report(
            self.plan.model,
            done,
            steps,
            self.plan.fingerprint,
            versions() | cards(self.model),
            seconds + self.read,
            exit_code=exit_code,
            phases=tuple(phases.items()),
            model_check=None if self.whole is None else self.whole.report(),
            **rest,  # type: ignore[arg-type]
        )

    def _step(self, step: Step, done: Done) -> Step:
        verdict = self.verdicts.get(step.path)
        if step.outcome != "replaced":
            return step
        if step.path in self.again:
            spec = self.again[step.path].spec
            step = replace(step, spec=spec, reason=spec.sentence())
        if step.path in self.refused:
            return replace(step, outcome="refused", reason=self.refused[step.path], verdict=verdict)
        if verdict is not None and not verdict.passed:
            return replace(step, outcome="refused", reason=f"proof failed: {verdict.reason}", verdict=verdict)
        if done == "rolled back":
            return replace(
                step, outcome="kept", reason="left as it was: the operation was rolled back", verdict=verdict
            )
        return replace(step, verdict=verdict)


def _reported(paths: Sequence[str], progress: Progress) -> Iterator[str]:
    """The paths, telling progress before each and after the last."""
    for done, path in enumerate(paths):
        progress(done, len(paths), path)
        yield path
    progress(len(paths), len(paths), "")
