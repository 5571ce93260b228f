"""stdout for results, stderr for progress, and neither for what libraries print.

Model libraries, engines and their child processes print to both streams at will, some from C++. So the two file
descriptors themselves are turned away while a command runs, and the command writes to private copies of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from types import TracebackType
from typing import Self, TextIO, cast


class Streams:
    """Holds ``out`` and ``err``, the real streams, while everything else that prints is silenced.

    With ``verbose`` it isn't silenced but goes to stderr, all of it, so that stdout has results alone. With ``shared``
    both streams are a child process's: nothing is turned away, and results go to stderr too. ``out`` is None where
    stdout is closed; writing to ``err`` never fails, since nothing there is worth ending a command for.
    """

    def __init__(self, *, verbose: bool, shared: bool = False) -> None:
        self._verbose, self._shared = verbose, shared
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        _occupy()
        self.err = self._messages()
        if self._shared:
            self.out: TextIO | None = self.err
            return self
        self.out = None if sys.stdout is None else self._private(sys.stdout, 1)
        sink = self.err if self._verbose else self._stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        self._turn(sys.stdout, 1, sink)
        if not self._verbose:
            self._turn(sys.stderr, 2, sink)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _private(self, stream: TextIO, descriptor: int) -> TextIO:
        """A copy of ``stream`` that stays when the descriptor is turned away; itself if it isn't on the descriptor."""
        if not _is_on(stream, descriptor):
            return stream
        stream.flush()
        copy = os.fdopen(os.dup(descriptor), "w", encoding=stream.encoding, errors="backslashreplace")
        self._stack.callback(_close, copy)
        return copy

    def _messages(self) -> TextIO:
        """What takes the place of stderr."""
        if sys.stderr is not None and not _is_on(sys.stderr, 2):
            return sys.stderr
        messages = _Messages(os.dup(2), "utf-8" if sys.stderr is None else sys.stderr.encoding)
        self._stack.callback(messages.close)
        return cast("TextIO", messages)

    def _turn(self, stream: TextIO | None, descriptor: int, sink: TextIO) -> None:
        """Let whatever is written to ``stream``, or to the descriptor below it, end in ``sink``."""
        if stream is None or not _is_on(stream, descriptor):
            redirect = contextlib.redirect_stdout if descriptor == 1 else contextlib.redirect_stderr
            self._stack.enter_context(redirect(sink))
            return
        saved = os.dup(descriptor)

        def restore() -> None:
            stream.flush()
            os.dup2(saved, descriptor)
            os.close(saved)

        os.dup2(sink.fileno(), descriptor)
        self._stack.callback(restore)


class _Messages(io.TextIOBase):
    """A stream that loses what it can't write: its disk is full, or its reader went away.

    It buffers nothing, so that an interrupt in the middle of a write can't have a line written twice.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str, /) -> int:
        data = text.encode(self._encoding, errors="backslashreplace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]
        return len(text)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def _occupy() -> None:
    """Open the null device on every standard descriptor that is closed, lest the next file opened becomes one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _is_on(stream: TextIO | None, descriptor: int) -> bool:
    try:
        return stream is not None and stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def _close(stream: TextIO) -> None:
    # Whether the result could be written was told when it was.
    with contextlib.suppress(OSError):
        stream.close()
