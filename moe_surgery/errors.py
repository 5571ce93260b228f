"""The errors of this library. Every one derives from ``SurgeryError`` and carries its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_surgery.report.outcomes import Outcomes


class SurgeryError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with.

    ``report`` tells what was found up to the error, where there is anything to tell.

    Example:
        >>> try:
        ...     report = moe_surgery.apply(model, expect=3)
        ... except moe_surgery.SurgeryError as error:
        ...     print(type(error).__name__, error.exit_code)
        ExpectationError 11
    """

    exit_code = 1
    report: Outcomes | None = None

    def with_report(self, report: Outcomes) -> SurgeryError:
        self.report = report
        return self

    def with_code(self, exit_code: int) -> SurgeryError:
        """Let this one error end the command line with the code of what it tells about."""
        self.exit_code = exit_code
        return self


class UsageError(SurgeryError):
    """A flag, an argument or an input file that can't be used as given."""

    exit_code = 2


class PackError(UsageError):
    """A rule pack that can't be read. The message starts with ``file:line:``."""


class ModelError(UsageError):
    """A model directory, config or checkpoint that can't be loaded."""


class PlanError(UsageError):
    """A plan file that can't be read, or that doesn't fit the model it is applied to."""


class GradientError(SurgeryError):
    """A swapped block was asked for gradients, which its kernels would return silently wrong."""


class ExpectationError(SurgeryError):
    """Fewer or more sites than expected, or a miss under ``strict``."""

    exit_code = 11


class ProofError(SurgeryError):
    """A swapped block could not be proven equal to the block it replaces; the model was put back."""

    exit_code = 12


class LedgerError(SurgeryError):
    """Weights of a checkpoint that no parameter took, or parameters that no weight reached."""

    exit_code = 13


class UnsupportedError(SurgeryError):
    """The installed engine, or its release, can't host the target."""

    exit_code = 14


class DeviceError(SurgeryError):
    """A GPU failed in a way that ends all use of it in this process."""

    exit_code = 16


class ReceiptError(SurgeryError):
    """The processes of a run disagree on what was done, or one of them, or all, told nothing."""

    exit_code = 15
