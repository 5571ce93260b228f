"""What a command says to its user: the result, how far it is, and what went wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe_surgery.cli.options import Color, Format, Output
from moe_surgery.cli.progress import Progress, progress
from moe_surgery.cli.streams import Streams
from moe_surgery.errors import SurgeryError, UsageError
from moe_surgery.models.checkpoint import is_part
from moe_surgery.report.files import check_writable, write_whole
from moe_surgery.report.json import dumps
from moe_surgery.report.words import visible

if TYPE_CHECKING:
    from rich.console import Console

    from moe_surgery.report.html_parts import Speed
    from moe_surgery.report.outcomes import Outcomes
    from moe_surgery.report.terminal import Note

_WIDTH_OF_FILES = 120
_STDOUT, _STDERR = "-", "/dev/stderr"
# The descriptors are turned away while a command runs, so what leads to them by name has to be known by name.
_STREAMS = {
    **dict.fromkeys(("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"), _STDOUT),
    **dict.fromkeys(("/dev/stderr", "/dev/fd/2", "/proc/self/fd/2"), _STDERR),
}


class Screen:
    """The way out for one command."""

    def __init__(self, output: Output, streams: Streams) -> None:
        self.output = output
        self._streams = streams
        self._taken: dict[str, Path] = {}
        self._read: set[str] = set()
        self._html: Path | None = None

    def will_write(self, *paths: Path | None, html: Path | None = None) -> None:
        """Check, before any work is done, that the command's results can go where they are to go.

        With ``-`` for one of a command's files that file's content is all that goes to stdout, and the result itself
        goes to stderr. A report is written to ``html`` as a page too, that of a failure as well. Raises
        :class:`UsageError` for a place that can't be written, for two results at one place, and for a file of a
        checkpoint, which no result may replace.
        """
        self._html = html
        for path in filter(None, (*paths, html)):
            place = _place(path)
            stream = place in (_STDOUT, _STDERR)
            if not stream:
                check_writable(place)
                if is_part(Path(place)) or is_part(path):
                    raise UsageError(f"can't write {path}: it is a file of a checkpoint")
            if place in self._taken and (stream or _is_regular(place)):
                raise UsageError(f"{path}: two results can't go to one place")
            self._taken[place] = path
        self._check_apart()
        stdout = self._out_place() == _STDOUT or _STDOUT in self._taken
        if stdout and self._streams.out is None:
            raise UsageError("stdout is closed; --out FILE writes the result to a file")

    def will_read(self, *paths: str | Path | None) -> None:
        """Say what files the command reads, before or after what it writes: no result may replace one of them.

        What is no file, such as a hub id or the name of a pack, is passed over.
        """
        self._read |= {os.path.realpath(path) for path in paths if path is not None and os.path.isfile(path)}
        self._check_apart()

    def _check_apart(self) -> None:
        for place, path in self._taken.items():
            if place in self._read:
                raise UsageError(f"can't write {path}: the command reads it")

    def file(self, path: Path, text: str) -> None:
        """Write one of the files that were told to :meth:`will_write`."""
        self._to(_place(path), text)

    def page(self, path: Path | None, text: Callable[[], str], code: int) -> None:
        """Write a file that shows the result once more, if there is to be one.

        What can't be written is an error of its own only where ``code``, of the command so far, tells of none.
        """
        try:
            if path is not None:
                self.file(path, text())
        except UsageError as fault:
            if not code:
                raise
            self.say(f"error: {fault}")

    def result(self, render: Callable[[Console], None], data: Mapping[str, Any], summary: str) -> None:
        """Write the command's one result: ``render``ed as text, or ``data`` as JSON.

        ``summary`` is the text's last line, which alone goes to stdout under ``--quiet``.
        """
        output = self.output
        if output.format is Format.json:
            self._write(dumps(data, ascii_only=not self._unicode()))
        elif output.quiet and self._stream() is not None:
            self._write(summary + "\n")
        else:
            self._write(self._rendered(render))

    def report(
        self,
        report: Outcomes,
        *,
        notes: Sequence[Note] = (),
        more: Mapping[str, Any] | None = None,
        speeds: Sequence[Speed] = (),
        svg: Path | None = None,
    ) -> None:
        """Write a report as the result, then its pictures: it is told even where these can't be written.

        ``notes`` are its further findings, and ``more`` the same for JSON.
        """
        from moe_surgery.report.figure import picture
        from moe_surgery.report.terminal import render, sentence

        def page() -> str:
            from moe_surgery.report.html import page

            return page(report, notes=notes, speeds=speeds, error=(more or {}).get("error"))

        data = {**report.to_json(), **(more or {})}
        self.result(lambda console: render(report, console, notes), data, sentence(report))
        self.page(svg, lambda: picture(report, notes=notes), report.exit_code)
        self.page(self._html, page, report.exit_code)

    def fail(self, message: str, code: int, report: Outcomes | None = None) -> int:
        """End with an error: the report so far if there is one, and the error in one line on stderr.

        If JSON was asked for, stdout gets the error as JSON too. Returns ``code``.
        """
        line = " ".join(message.split())
        with suppress(SurgeryError):  # where the result can't be written, the first error is the one to tell
            if report is not None:
                self.report(report.but(exit_code=code), more={"error": line})
            elif self.output.format is Format.json:
                self._write(dumps({"schema": "moe-surgery/error/1", "error": line, "exit": code}, ascii_only=True))
        self.say(f"error: {line}")
        return code

    def say(self, text: str) -> None:
        """Write a line to stderr."""
        self._streams.err.write(visible(text.rstrip("\n")) + "\n")
        self._streams.err.flush()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """How far the command is, on stderr."""
        wanted = not (self.output.no_progress or self.output.quiet)
        with progress(self._streams.err, wanted=wanted, no_color=self.output.color is Color.never) as shown:
            yield shown

    def _out_place(self) -> str:
        """Where the result goes; to stderr if another file's content goes to stdout."""
        if self.output.out is not None:
            return _place(self.output.out)
        return _STDERR if _STDOUT in self._taken else _STDOUT

    def _write(self, text: str) -> None:
        place = self._out_place()
        try:
            self._to(place, text)
        except UsageError:
            if place != _STDOUT:  # a file: what took long to find is shown at least
                self._to(_STDERR, text)
            raise

    def _to(self, place: str, text: str) -> None:
        stream = {_STDOUT: self._streams.out, _STDERR: self._streams.err}.get(place)
        if place not in (_STDOUT, _STDERR):
            write_whole(place, text)
        elif stream is not None:
            try:
                stream.write(text)
                stream.flush()
            except BrokenPipeError:
                pass  # whoever read it has seen enough of it; the command ends with its own code
            except OSError as fault:
                raise UsageError(f"can't write the result to stdout: {fault.strerror or fault}") from fault

    def _stream(self) -> TextIO | None:
        """The stream that the result goes to; None for a file."""
        place = self._out_place()
        return self._streams.out if place == _STDOUT else self._streams.err if place == _STDERR else None

    def _unicode(self) -> bool:
        stream = self._stream()
        return stream is None or (stream.encoding or "").lower().startswith("utf")

    def _rendered(self, render: Callable[[Console], None]) -> str:
        """The text as it suits where it goes; all of it before any is written, so that no half of it ever is."""
        from rich.console import Console

        stream, color = self._stream(), self.output.color
        terminal = stream is not None and stream.isatty()
        # The console has to know the encoding, for the characters that it may use.
        encoding = "utf-8" if stream is None else stream.encoding
        page = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        width = _WIDTH_OF_FILES if stream is None else _width(stream)
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


def _place(path: Path) -> str:
    """``path`` as it is written to: a standard stream if it leads there, else the file at the end of its links."""
    text = os.fspath(path)
    return _STREAMS.get(text) or (os.path.realpath(text) if _is_regular(text) else text)


def _is_regular(path: str) -> bool:
    """Whether it is a regular file, or will be."""
    return os.path.isfile(path) or not os.path.exists(path)


def _width(stream: TextIO) -> int:
    """Columns of the terminal; of a page where there is none, so that logs don't depend on where they are made."""
    if os.environ.get("COLUMNS", "").isdigit():
        return max(int(os.environ["COLUMNS"]), 1)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _WIDTH_OF_FILES
    except (OSError, ValueError):
        return _WIDTH_OF_FILES
