"""The report that ``plan``, ``verify`` and ``apply`` give: outcomes that can be printed and taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_surgery.report.outcomes import Outcomes

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.operate.transaction import Transaction


@dataclass(frozen=True, repr=False)
class Report(Outcomes):
    """The outcomes for a whole model; ``transaction`` is the operation behind them, where there is one to undo."""

    transaction: Transaction | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """One short line; ``render`` prints all of it."""
        from moe_surgery.report.terminal import sentence

        return f"<Report of {self.model}: {sentence(self)}>"

    def _repr_html_(self) -> str:
        """The report as notebooks show it, with the same rows as on a terminal."""
        from moe_surgery.report.figure import page

        return page(self)

    def render(self, console: Console) -> None:
        """Print the report: one row per kind of site, indices folded, the sentence to quote last."""
        from moe_surgery.report.terminal import render

        render(self, console)
