"""What a command says to its user: the result, how far it is, and what went wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe_surgery.cli.options import Color, Format, Output
from moe_surgery.cli.progress import Progress, progress
from moe_surgery.cli.streams import Streams
from moe_surgery.report.json import dumps

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.report.outcomes import Outcomes
    from moe_surgery.report.terminal import Note

_WIDTH_OF_FILES = 120


class Screen:
    """The way out for one command."""

    def __init__(self, output: Output, streams: Streams) -> None:
        self.output = output
        self._streams = streams

    def result(self, render: Callable[[Console], None], data: Mapping[str, Any], summary: str) -> None:
        """Write the command's one result: ``render``ed as text, or ``data`` as JSON.

        ``summary`` is the text's last line, which alone goes to stdout under ``--quiet``.
        """
        output = self.output
        if output.format is Format.json:
            self._write(dumps(data, ascii_only=not self._unicode()))
        elif output.quiet and output.out is None:
            self._write(summary + "\n")
        else:
            self._write(self._rendered(render))

    def report(
        self,
        report: Outcomes,
        *,
        notes: Sequence[Note] = (),
        more: Mapping[str, Any] | None = None,
        svg: Path | None = None,
    ) -> None:
        """Write a report as the result; ``notes`` are its further findings, and ``more`` the same for JSON."""
        from moe_surgery.report.figure import save_svg
        from moe_surgery.report.terminal import render, sentence

        if svg is not None:
            save_svg(report, svg, notes=notes)
        data = {**report.to_json(), **(more or {})}
        self.result(lambda console: render(report, console, notes), data, sentence(report))

    def fail(self, message: str, code: int, report: Outcomes | None = None) -> int:
        """End with an error: the report so far if there is one, and the error in one line on stderr.

        If JSON was asked for, stdout gets the error as JSON too. Returns ``code``.
        """
        line = " ".join(message.split())
        if report is not None:
            self.report(report.but(exit_code=code), more={"error": line})
        elif self.output.format is Format.json:
            self._write(dumps({"schema": "moe-surgery/error/1", "error": line, "exit": code}, ascii_only=True))
        self.say(f"error: {line}")
        return code

    def say(self, text: str) -> None:
        """Write a line to stderr."""
        self._streams.err.write(text.rstrip("\n") + "\n")
        self._streams.err.flush()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """How far the command is, on stderr."""
        wanted = not (self.output.no_progress or self.output.quiet)
        with progress(self._streams.err, wanted=wanted, no_color=self.output.color is Color.never) as shown:
            yield shown

    def _write(self, text: str) -> None:
        if self.output.out is not None:
            from moe_surgery.report.files import write_whole

            write_whole(self.output.out, text)
        else:
            self._streams.out.write(text)
            self._streams.out.flush()

    def _unicode(self) -> bool:
        return self.output.out is not None or (self._streams.out.encoding or "").lower().startswith("utf")

    def _rendered(self, render: Callable[[Console], None]) -> str:
        """The text as it suits where it goes; all of it before any is written, so that no half of it ever is."""
        from rich.console import Console

        stream, color = self._streams.out, self.output.color
        file = self.output.out is not None
        terminal = stream.isatty() and not file
        # The console has to know the encoding, for the characters that it may use.
        page = io.TextIOWrapper(io.BytesIO(), encoding="utf-8" if file else stream.encoding, errors="backslashreplace")
        width = _WIDTH_OF_FILES if file else _width(stream)
        if color is Color.always:
            # The sixteen named colours are all that reports use.
            console = Console(file=page, width=width, force_terminal=True, color_system="standard", no_color=False)
        elif color is Color.never or not terminal or os.environ.get("NO_COLOR"):
            console = Console(file=page, width=width, color_system=None)
        else:
            console = Console(file=page, width=width, force_terminal=True)
        render(console)
        page.seek(0)
        return page.read()


def _width(stream: TextIO) -> int:
    """Columns of the terminal; of a page where there is none, so that logs don't depend on where they are made."""
    if os.environ.get("COLUMNS", "").isdigit():
        return max(int(os.environ["COLUMNS"]), 1)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _WIDTH_OF_FILES
    except (OSError, ValueError):
        return _WIDTH_OF_FILES
