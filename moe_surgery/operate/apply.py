"""Carrying a plan out: build and prove every block beside the model, then exchange all of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from moe_surgery.errors import PlanError, ProofError, SurgeryError
from moe_surgery.installed.versions import versions
from moe_surgery.operate.transaction import Swap, Transaction, without_interrupts
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.survey import Surveyed
from moe_surgery.prove.results import prove_block
from moe_surgery.prove.verdict import Verdict
from moe_surgery.read.reading import Reading
from moe_surgery.read.record.attributes import made
from moe_surgery.report.outcomes import Done, Memory, Step
from moe_surgery.report.report import Report
from moe_surgery.targets.base import SwappedBlock, Target
from moe_surgery.targets.convention import Convention
from moe_surgery.weights.tensors import BlockTensors, gather

Progress = Callable[[int, int, str], None]
"""``(done, total, what)``: sites proven so far, sites in all, and the path being worked on."""


@dataclass(frozen=True)
class Settings:
    """How to operate: ``margin`` the proof asks for, its ``seed``, and whether the originals are kept for undo."""

    margin: float = 5.0
    seed: int = 0
    undoable: bool = True
    progress: Progress | None = None


def check_fits(plan: Plan, sites: Sequence[Surveyed]) -> dict[str, Reading]:
    """The readings of the sites a plan replaces. Raises :class:`PlanError` if the model isn't the one planned for."""
    found = {item.site.path: item for item in sites}
    planned = [step.path for step in plan.steps]
    if list(found) != planned:
        strange = sorted(set(found) ^ set(planned)) or ["their order"]
        raise PlanError(f"the plan is for other sites than the model has: they differ in {', '.join(strange[:3])}")
    readings = {}
    for step in plan.steps:
        if step.outcome != "replaced":
            continue
        item = found[step.path]
        if item.reading is None:
            raise PlanError(f"{step.path}: planned to be replaced, but now {item.unread or 'already fused'}")
        if item.reading.spec != step.spec:
            wanted = step.spec.sentence() if step.spec else "nothing"
            raise PlanError(f"{step.path}: planned as {wanted}, but now {item.reading.spec.sentence()}")
        readings[step.path] = item.reading
    return readings


class Operation:
    """One plan on one model. ``run`` proves every block; ``commit`` (after it) exchanges them."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        sites: Sequence[Surveyed],
        targets: Callable[[str], Target],
        settings: Settings,
    ) -> None:
        self.model, self.plan, self.settings = model, plan, settings
        named = cache(targets)
        self.targets = {step.path: named(step.target) for step in plan.steps if step.target is not None}
        self.rules = {step.path: step.rule for step in plan.steps}
        self.readings = check_fits(plan, sites)
        self.verdicts: dict[str, Verdict] = {}
        self.started = time.perf_counter()

    def verify(self) -> Report:
        """The proof alone. Every block is built, proven and thrown away; the model is left as it was."""
        for path in self._paths():
            self._proven(path)
        failed = any(not verdict.passed for verdict in self.verdicts.values())
        return self._report("verified", exit_code=ProofError.exit_code if failed else 0)

    def apply(self) -> Report:
        """Build and prove every block, then exchange all. Raises :class:`ProofError` with the report if one fails."""
        if self.settings.undoable:
            swaps = [Swap.at(self.model, path, self._accepted(path)) for path in self._paths()]
            transaction = Transaction(swaps)
            transaction.commit()
        else:
            for path in self._paths():
                self._accepted(path)
            transaction = self._exchange_one_by_one()
        memory = Memory(
            moved=sum(swap.new.moved_bytes for swap in transaction.swaps),
            new=sum(swap.new.new_bytes for swap in transaction.swaps),
            kept=sum(_own_bytes(swap) for swap in transaction.swaps),
        )
        return self._report("applied", memory=memory, transaction=transaction)

    def _exchange_one_by_one(self) -> Transaction:
        """Rebuild each proven block and give its original up before the next: one block of extra memory at most.

        Interrupts wait until the end, since what is given up can't be put back.
        """
        done: list[Swap] = []
        with without_interrupts():
            for path in self.readings:
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
        transaction = Transaction(done)
        transaction.committed = True
        return transaction

    def _paths(self) -> list[str]:
        paths = list(self.readings)
        if self.settings.progress is None:
            return paths
        return list(_Reported(paths, self.settings.progress))

    def _build(self, path: str, tensors: BlockTensors | None = None) -> SwappedBlock:
        block = self.model.get_submodule(path)
        reading = self.readings[path]
        tensors = tensors or gather(block, reading.layout)
        new = self.targets[path].build(reading.spec, tensors, prefix=path)
        new.rule = self.rules[path]
        if reading.spec.at == "experts" or not (reading.calling.plain and reading.results is None):
            new.convention = Convention.of(reading.spec, reading.calling, reading.results, tensors)
        for (inside, name), value in reading.kept:
            if not inside and not hasattr(new, name):
                setattr(new, name, made(value, tensors.w13.device, tensors.w13.dtype))
        owner, _, _ = reading.layout.router.path.rpartition(".")
        if owner and "." not in owner:
            new.observe(owner, block.get_submodule(owner))
        return new

    def _proven(self, path: str) -> SwappedBlock:
        block = self.model.get_submodule(path)
        reading = self.readings[path]
        with torch.inference_mode(False), torch.no_grad():
            tensors = gather(block, reading.layout)
            new = self._build(path, tensors)
            settings = self.settings
            convention = Convention.of(reading.spec, reading.calling, reading.results, tensors)
            self.verdicts[path] = prove_block(
                block, new, reading.spec, tensors, convention, seed=settings.seed, margin=settings.margin
            )
        return new

    def _accepted(self, path: str) -> SwappedBlock:
        new = self._proven(path)
        verdict = self.verdicts[path]
        if not verdict.passed:
            report = self._report("rolled back", exit_code=ProofError.exit_code)
            raise ProofError(f"{path}: {verdict.reason}").with_report(report)
        return new

    def _report(self, done: Done, exit_code: int = 0, **rest: object) -> Report:
        steps = tuple(self._step(step, done) for step in self.plan.steps)
        seconds = time.perf_counter() - self.started
        return Report(
            self.plan.model,
            done,
            steps,
            self.plan.fingerprint,
            versions(),
            seconds,
            exit_code=exit_code,
            **rest,  # type: ignore[arg-type]
        )

    def _step(self, step: Step, done: Done) -> Step:
        verdict = self.verdicts.get(step.path)
        if step.outcome != "replaced":
            return step
        if verdict is not None and not verdict.passed:
            return replace(step, outcome="refused", reason=f"proof failed: {verdict.reason}", verdict=verdict)
        if done == "rolled back":
            return replace(step, outcome="kept", reason="left as it was: another site's proof failed", verdict=verdict)
        return replace(step, verdict=verdict)


class _Reported:
    """Iterates over paths, telling progress before each and after the last."""

    def __init__(self, paths: Sequence[str], progress: Progress) -> None:
        self.paths, self.progress = paths, progress

    def __iter__(self):  # type: ignore[no-untyped-def]
        for done, path in enumerate(self.paths):
            self.progress(done, len(self.paths), path)
            yield path
        self.progress(len(self.paths), len(self.paths), "")


def _own_bytes(swap: Swap) -> int:
    """Bytes of the old block that the new one doesn't share, which are held only so that undo can put it back."""
    if swap.old is None:
        return 0
    sizes: Mapping[int, int] = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in swap.old.parameters()
    }
    return max(sum(sizes.values()) - swap.new.moved_bytes, 0)
