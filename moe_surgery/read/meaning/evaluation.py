"""What the meaning of one operation may ask of the evaluation that it is part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.rows import Rows
from moe_surgery.read.record.flow import Flow, Op


class Evaluation(Protocol):
    """A record, evaluated operation by operation: what the operations so far have come to."""

    flow: Flow
    terms: Terms

    def value(self, operand: Any) -> Any:
        """An operand's value: that of a result, or the operand itself."""

    def rows(self, operand: Any) -> Rows:
        """An operand as rows of terms: a result, known numbers, or a Python number."""

    def vectors(self, operand: Any) -> Rows:
        """An operand with one term per vector along the last dimension."""


Meaning = Callable[[Evaluation, Op], Any]
"""What an operation comes to."""
