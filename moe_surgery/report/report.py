"""The report that ``scan``, ``verify`` and ``apply`` give: outcomes that can be printed and taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_surgery.report.outcomes import Outcomes

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.operate.transaction import Transaction


@dataclass(frozen=True, repr=False)
class Report(Outcomes):
    """What became of every site of a model. It prints as on a terminal, and shows as a table in notebooks.

    Attributes:
        model: The model's name or class.
        done: "scanned", "planned", "verified", "applied", "rolled back" or "undone".
        steps: One for each site, with its ``path``, ``kind``, ``outcome``, ``reason``, ``spec`` and ``verdict``.
        replaced: Those that are replaced; and so ``kept``, ``missed`` and ``refused``.
        fingerprint: The plan's.
        versions: Name → version of what it was made with; ``"GPU"`` → the cards that hold the model, if any does.
        seconds: How long it took; ``phases`` tells the parts of it.
        memory: Bytes that were moved, made anew and kept for ``undo``.
        exit_code: What the command line ends with.
        model_check: How the whole model did; None where that wasn't asked.
        transaction: The operation behind it, where there is one to undo.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> report = moe_surgery.apply(model, target="reference")
        >>> report.done, report.exit_code, report.to_json()["schema"]
        ('applied', 0, 'moe-surgery/report/1')
    """

    transaction: Transaction | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """One short line; printing it shows all."""
        from moe_surgery.report.terminal import sentence

        return f"<Report of {self.model}: {sentence(self)}>"

    def __str__(self) -> str:
        """What :meth:`render` prints, without colours, 120 columns wide."""
        from moe_surgery.report.figure import plain

        return plain(self.render, 120)

    def _repr_html_(self) -> str:
        """The report as notebooks show it, with the same rows as on a terminal."""
        from moe_surgery.report.figure import page

        return page(self)

    def render(self, console: Console) -> None:
        """Print the report: one row per kind of site, indices folded, the sentence to quote last.

        Args:
            console: One of rich's.
        """
        from moe_surgery.report.terminal import render

        render(self, console)
