"""Carrying a plan out: build and prove every block beside the model, then exchange all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_surgery.answers import output_of
from moe_surgery.errors import ProofError, SurgeryError
from moe_surgery.interrupts import without_interrupts
from moe_surgery.operate.ahead import ProbesAhead
from moe_surgery.operate.building import Double, Unanswerable, built, gathered, take_over, uncounted
from moe_surgery.operate.findings import Findings
from moe_surgery.operate.fitting import check_fits
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
from moe_surgery.read.record.state import unwritten
from moe_surgery.report.outcomes import Memory
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
        begun: float,
    ) -> None:
        self.model, self.plan, self.settings, self.kernels = model, plan, settings, kernels
        named = cache(targets)
        self.targets = {step.path: named(step.target) for step in plan.steps if step.target is not None}
        self.rules = {step.path: step.rule for step in plan.steps}
        self.readings = check_fits(plan, sites)
        self.findings = Findings(model, plan, settings, len(self.readings), begun)
        self.prepared: set[MoESpec] = set()
        self.wrote: dict[str, list[dict[tuple[str, str], Any]]] = {}  # attributes, in each call of the model's
        self.heard: WholeModel | None = None
        self.exchanged: Transaction | None = None
        folded = {reading.spec for path, reading in self.readings.items() if self.targets[path].name == "folded"}
        if folded:
            kernels.begin(folded, next(model.parameters()).dtype, NUMBERS)

    def verify(self) -> Report:
        """The proof alone, of what ``apply`` would build: it is thrown away, and the model is left as it was."""
        with uncounted(self.model, self.readings):
            self._listen()
            with self._ahead() as ahead:
                for path in self._paths():
                    self._proven(path, ahead)
        self.findings.check_counts("verified")
        return self.findings.report("verified", exit_code=ProofError.exit_code if self.findings.wrong() else 0)

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
        findings = self.findings
        self._listen()
        findings.whole = self.heard
        undoable = self.settings.undoable
        blocks: dict[str, StandingBlock] = {}
        with self._ahead() as ahead:
            for path in self._paths():
                new = self._accepted(path, ahead)
                if new is not None:
                    blocks[path] = new if undoable else Double(new, self.wrote.pop(path, ()))
        findings.check_counts("rolled back")
        findings.all_proven()
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
        return findings.report("applied", memory=memory, transaction=transaction)

    def _listen(self) -> None:
        """Hear what the model gives its blocks: one that gets more than it was read with is read again, or refused."""
        wanted, findings = self.settings.model_check, self.findings
        if wanted is False or not self.readings:
            return
        given = None if wanted is True else wanted
        self.heard = self._run_before(given)
        again = read_again(self.heard, self.targets)
        if again:
            self.readings |= again
            findings.again = {path: reading.spec for path, reading in again.items()}
            self.heard = self._run_before(given)
        for path, call in self.heard.unread.items():
            findings.refused[path] = f"the model calls it with {call.told}, which it was not read with"

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
        findings = self.findings
        if findings.whole is not None:
            bound = max((findings.verdicts[path].bound for path in blocks), default=0.0)
            difference = findings.whole.after(blocks, bound)
            if difference is not None:
                raise findings.failed(f"the whole model differs: {difference}")
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
        block, probes, findings = self.model.get_submodule(path), ahead.of(path), self.findings
        if path in findings.refused:
            return None
        reading = self.readings[path]
        with torch.inference_mode(False), torch.no_grad():
            tensors = gathered(block, reading)
            try:
                new = self._build(path, tensors)
                name = None if self.heard is None else self.heard.inner.unanswered(path, new)
                if name is not None:
                    raise Unanswerable(f"the model calls its {name} past it, which can't be called in a swapped block")
            except Unanswerable as error:
                findings.refused[path] = str(error)
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
            findings.verdicts[path] = verdict
            if verdict.powerless:
                findings.refused[path] = f"can't be proven: {verdict.reason}"
                return None
            if verdict.passed and findings.whole is not None:
                self._ask_as_the_model_does(path, new, tensors, findings.whole)
        return new

    def _ask_as_the_model_does(self, path: str, new: StandingBlock, tensors: BlockTensors, whole: WholeModel) -> None:
        """Ask a new block what the model asked the old one. Raises :class:`ProofError` if the answers differ."""
        reading = self.readings[path]
        for called in whole.heard(path, reading.results):
            try:
                heard = called.by_role(reading.calling, reading.spec.at)
                with new.unwritten():
                    answer = output_of(reading.results, new(*reading.calling.placed(heard.roles())))
                    answer = reading.calling.combined(answer, heard.roles())
                    if not self.settings.undoable:
                        self.wrote.setdefault(path, []).append(new.written())
            except Exception as error:
                raise self.findings.failed(f"{path}: {error} (on what the model gives it)") from error
            apart, fault = disagreement(heard, answer, reading.spec, tensors, self.findings.verdicts[path].bound)
            if fault is not None:
                raise self.findings.failed(f"{path}: {fault}")
            whole.saw(apart)

    def _accepted(self, path: str, ahead: ProbesAhead) -> StandingBlock | None:
        new = self._proven(path, ahead)
        if new is not None and not self.findings.verdicts[path].passed:
            raise self.findings.failed(f"{path}: {self.findings.verdicts[path].reason}")
        return new


def _reported(paths: Sequence[str], progress: Progress) -> Iterator[str]:
    """The paths, telling progress before each and after the last."""
    for done, path in enumerate(paths):
        progress(done, len(paths), path)
        yield path
    progress(len(paths), len(paths), "")
