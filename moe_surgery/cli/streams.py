"""stdout for results, stderr for progress, and neither for what libraries print.

Model libraries, engines and their child processes print to both streams at will, some from C++. So the two file
descriptors themselves are turned away while a command runs, and the command writes to private copies of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import Self, TextIO


class Streams:
    """Holds ``out`` and ``err``, the real streams, while everything else that prints is silenced.

    With ``verbose`` it isn't silenced but goes to stderr, all of it, so that stdout has results alone. With ``shared``
    both streams are a child process's: nothing is turned away, and results go to stderr too.
    """

    def __init__(self, *, verbose: bool, shared: bool = False) -> None:
        self._verbose, self._shared = verbose, shared
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._shared:
            self.out = self.err = sys.stderr
            return self
        self.err = self._private(sys.stderr, 2)
        self.out = self._private(sys.stdout, 1)
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

    def _turn(self, stream: TextIO, descriptor: int, sink: TextIO) -> None:
        """Let whatever is written to ``stream``, or to the descriptor below it, end in ``sink``."""
        if not _is_on(stream, descriptor):
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


def _is_on(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def _close(stream: TextIO) -> None:
    # A reader that went away (`moe-surgery scan MODEL | head -1`) is no failure of the command.
    with contextlib.suppress(BrokenPipeError):
        stream.close()
