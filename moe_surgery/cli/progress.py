"""Progress on stderr: one bar on a terminal, plain lines where there is none, as far apart as a tenth and some seconds.

Both say how long the rest will take, as the steps so far went.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TextIO

from moe_surgery.report.words import estimate, size, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


_APART = 2.0
"""Seconds between two lines of a log; what is done in less is told by its end."""


class Progress(Protocol):
    """What a command tells about how far it is."""

    def phase(self, text: str) -> None:
        """A new part of the work begins, of unknown length."""

    def step(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` units of this part are finished, ``what`` is the one at hand."""

    def read(self, done: int, total: int, what: str) -> None:
        """The same in bytes."""


class Silent:
    """No progress at all."""

    def phase(self, text: str) -> None:
        pass

    def step(self, done: int, total: int, what: str) -> None:
        pass

    def read(self, done: int, total: int, what: str) -> None:
        pass


class Lines:
    """Progress for logs: a line per phase, and one for every tenth of its steps, unless another was just written.

    What is left is told from the phase's second step on: before its first are imports and other things done once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tenth = 0
        self._first: tuple[float, int] | None = None
        self._written = 0.0

    def phase(self, text: str) -> None:
        self._tenth = 0
        self._first = None
        self._write(text)

    def step(self, done: int, total: int, what: str) -> None:
        self._tell(done, total, f"{done} of {total}", what)

    def read(self, done: int, total: int, what: str) -> None:
        self._tell(done, total, f"{size(done)} of {size(total)}", what)

    def _tell(self, done: int, total: int, amount: str, what: str) -> None:
        now = monotonic()
        began, before = self._first = self._first or (now, done)
        tenth = 10 * done // total if total else 10
        late = now - max(self._written, began) >= _APART or (self._tenth and done == total)
        if tenth > self._tenth and late:
            self._tenth = tenth
            rest = ""
            if before < done < total:
                rest = f", about {estimate((now - began) / (done - before) * (total - done))} left"
            self._write(f"{10 * tenth}% ({amount}{rest}) {what}")

    def _write(self, text: str) -> None:
        self._written = monotonic()
        self._stream.write(visible(text).rstrip() + "\n")
        self._stream.flush()


class Terminal:
    """One bar, gone when the command ends."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, amount="")

    def phase(self, text: str) -> None:
        self._bar.reset(self._task, total=None, description=visible(text), amount="")

    def step(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=visible(what), amount=f"{done}/{total}")

    def read(self, done: int, total: int, what: str) -> None:
        amount = f"{size(done)} of {size(total)}"
        self._bar.update(self._task, completed=done, total=total, description=visible(what), amount=amount)


@contextmanager
def progress(stream: TextIO, *, wanted: bool, no_color: bool) -> Iterator[Progress]:
    """The form of progress that suits ``stream``."""
    if not wanted:
        yield Silent()
    elif not stream.isatty():
        yield Lines(stream)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
        from rich.text import Text

        class Times(ProgressColumn):
            """How long a phase has taken so far, and how long it still will."""

            max_refresh = 0.5

            def render(self, task: Task) -> Text:
                so_far = estimate(task.elapsed or 0)
                rest = task.time_remaining if task.total is not None and not task.finished else None
                return Text(so_far if rest is None else f"{so_far}, about {estimate(rest)} left")

        console = Console(file=stream, no_color=no_color or None)
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}"),
            Times(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            yield Terminal(bar)
