"""What an operation has found out about its sites, and the report that tells it."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import nn

from moe_surgery.errors import ExpectationError, ProofError, SurgeryError
from moe_surgery.installed.cards import cards
from moe_surgery.installed.versions import versions
from moe_surgery.operate.model_check import WholeModel
from moe_surgery.operate.settings import Settings
from moe_surgery.operate.transaction import Transaction
from moe_surgery.planning.plan import Plan
from moe_surgery.prove.verdict import Verdict
from moe_surgery.report.outcomes import Done, Memory, Step
from moe_surgery.report.report import Report
from moe_surgery.spec import MoESpec


class Findings:
    """Verdicts, refusals and times of one operation, which fills them in while it goes from site to site.

    ``verdicts`` and ``refused`` are by path, a refusal with its reason; ``again`` has the specs of blocks that were
    read once more as the model calls them, and ``whole`` the model around the blocks. ``begun`` is when the model began
    to be read, by ``time.perf_counter``.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings, sites: int, begun: float) -> None:
        self._model, self._plan, self._settings, self._sites = model, plan, settings, sites
        self.verdicts: dict[str, Verdict] = {}
        self.refused: dict[str, str] = {}
        self.again: dict[str, MoESpec] = {}
        self.whole: WholeModel | None = None
        self._started = time.perf_counter()
        self._read = self._started - begun
        self._proved = 0.0

    def all_proven(self) -> None:
        """Take the time: what comes now is the exchange."""
        self._proved = time.perf_counter() - self._started

    def wrong(self) -> bool:
        """Whether a proof failed that had the power to tell."""
        return any(not verdict.passed and not verdict.powerless for verdict in self.verdicts.values())

    def failed(self, reason: str) -> SurgeryError:
        """The error, with the report, of an operation that is given up."""
        report = self.report("rolled back", exit_code=ProofError.exit_code)
        return ProofError(reason).with_report(report)

    def check_counts(self, done: Done) -> None:
        """Raise :class:`ExpectationError` if the proofs have left fewer blocks than were asked for."""
        settings, refused = self._settings, self.refused
        left = self._sites - len(refused)
        reason = None
        if settings.expect is not None and left != settings.expect and refused:
            reason = f"expected {settings.expect} sites to replace, {left} can be"
        elif settings.strict and refused:
            reason = f"strict: {len(refused)} sites are refused" if len(refused) > 1 else "strict: 1 is refused"
        if reason is not None:
            listed = "; ".join(f"{path}: {why}" for path, why in refused.items())
            report = self.report(done, exit_code=ExpectationError.exit_code)
            raise ExpectationError(f"{reason}: {listed}").with_report(report)

    def report(
        self,
        done: Done,
        exit_code: int = 0,
        memory: Memory | None = None,
        transaction: Transaction | None = None,
    ) -> Report:
        """Everything found so far, as what was ``done`` in the end."""
        steps = tuple(self._step(step, done) for step in self._plan.steps)
        seconds = time.perf_counter() - self._started
        phases = {"read": self._read, "prove": self._proved or seconds}
        if self._proved and done == "applied":
            phases["exchange"] = seconds - self._proved
        return Report(
            self._plan.model,
            done,
            steps,
            self._plan.fingerprint,
            versions() | cards(self._model),
            seconds + self._read,
            exit_code=exit_code,
            phases=tuple(phases.items()),
            model_check=None if self.whole is None else self.whole.report(),
            memory=memory or Memory(),
            transaction=transaction,
        )

    def _step(self, step: Step, done: Done) -> Step:
        verdict = self.verdicts.get(step.path)
        if step.outcome != "replaced":
            return step
        if step.path in self.again:
            spec = self.again[step.path]
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
