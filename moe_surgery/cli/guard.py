"""From a command's body to an exit code, whatever happens in between."""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from moe_surgery.cli import exits
from moe_surgery.cli.options import Output
from moe_surgery.cli.screen import Screen
from moe_surgery.cli.streams import Streams
from moe_surgery.errors import SurgeryError


def run(output: Output, body: Callable[[Screen], int], *, shared: bool = False) -> None:
    """Run ``body`` and end the command with the code it returns, or with that of the error it raises.

    With ``shared`` stdout and stderr belong to a child process, and the result goes to stderr.
    """
    with Streams(verbose=output.verbose, shared=shared) as streams:
        code = _guarded(Screen(output, streams), body)
    raise typer.Exit(code)


def _guarded(screen: Screen, body: Callable[[Screen], int]) -> int:
    try:
        with _signals(), _warnings(screen):
            screen.will_write(screen.output.out)
            return body(screen)
    except SurgeryError as fault:
        if screen.output.verbose:
            screen.say(traceback.format_exc())
        return screen.fail(str(fault), fault.exit_code, fault.report)
    except KeyboardInterrupt:
        return screen.fail("interrupted; nothing was left half done", exits.INTERRUPTED)
    except MemoryError as fault:
        return screen.fail(f"out of memory: {fault or 'the model and its new blocks need more'}", exits.FAILED)
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        return screen.fail(f"{where}{fault.strerror or fault}", exits.USAGE)
    except Exception as fault:
        if screen.output.verbose:
            screen.say(traceback.format_exc())
        if _allocation(fault):
            return screen.fail(f"out of memory: {' '.join(str(fault).split())}", exits.FAILED)
        hint = "" if screen.output.verbose else " (-v shows the traceback)"
        return screen.fail(f"unexpected {type(fault).__name__}: {fault}{hint}", exits.FAILED)


def _allocation(fault: Exception) -> bool:
    """Whether torch could not allocate a tensor; on a CPU it has no class of error for that."""
    return type(fault).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(fault)


class _Said(logging.Handler):
    """Says what the library logs."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO if screen.output.verbose else logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.say(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


@contextmanager
def _warnings(screen: Screen) -> Iterator[None]:
    """Let what the library warns of be lines of the command's own."""
    logger, handler = logging.getLogger("moe_surgery"), _Said(screen)
    before = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate, level = False, min(handler.level, logger.level or handler.level)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        logger.setLevel(before[1])


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM, like SIGINT, into one :class:`KeyboardInterrupt`, so that an operation under way is rolled back.

    Further ones are ignored then: they must not interrupt the rolling back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
