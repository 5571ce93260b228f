"""Work that a signal may not leave half done: putting things back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_Handler = Callable[..., Any] | int


@contextmanager
def without_interrupts(*, once: bool = False) -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the end; then deliver them. Off the main thread it does nothing.

    With ``once``, for work that may hang, a second one has both delivered at once. A signal that is handled outside of
    Python isn't held back: its handler couldn't be put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    before: dict[int, _Handler] = {}

    def hold(number: int, frame: Any) -> None:
        held.append((number, frame))
        if once and len(held) > 1:
            deliver()

    def deliver() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is hold:  # which another signal, or its handler, may have changed meanwhile
                signal.signal(number, handler)
        with ExitStack() as each:  # one that raises an error keeps none of the others from being delivered
            while held:
                number, frame = held.pop()
                each.callback(_deliver, before[number], number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            before[number] = handler
            signal.signal(number, hold)
    try:
        yield
    finally:
        deliver()


def _deliver(handler: _Handler, number: int, frame: Any) -> None:
    """Call a handler as the signal would have; raised once more, an event loop would be told of it twice."""
    if callable(handler):
        handler(number, frame)
    else:
        signal.raise_signal(number)
