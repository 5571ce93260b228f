"""What the command line ends with. Codes of this domain start at 10, so that they meet no shell's or parser's own."""

from __future__ import annotations

DONE = 0
FAILED = 1
USAGE = 2
CHANGES = 10
UNPROVEN = 12
UNSUPPORTED = 14
INTERRUPTED = 130

MEANINGS: tuple[tuple[int, str], ...] = (
    (DONE, "done, or nothing to do"),
    (FAILED, "out of memory, or an unexpected failure"),
    (USAGE, "wrong usage; input that can't be read, output that can't be written"),
    (CHANGES, "changes are pending (plan --check), or found (diff)"),
    (11, "expectation not met, or a site missed or refused under --strict"),
    (UNPROVEN, "a proof failed, rolled back; outputs differ; an audited layer is wrong"),
    (13, "weights not covered"),
    (UNSUPPORTED, "unsupported version, or no engine"),
    (15, "processes disagree, or none loaded a model"),
    (16, "a GPU failed and can't be used any more"),
    (INTERRUPTED, "interrupted, rolled back"),
)


def epilog() -> str:
    """The exit codes as the end of ``--help``."""
    return "\n".join(["Exit codes:", *(f"{code:>5}  {meaning}" for code, meaning in MEANINGS)])
