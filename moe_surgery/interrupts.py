"""Work that a signal may not leave half done: putting things back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_interrupts(*, once: bool = False) -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the end; then deliver them. Off the main thread it does nothing.

    A handler that wasn't installed from Python can't be put back, and is left alone. With ``once``, for work that may
    hang, a second one is delivered at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def hold(number: int, frame: Any) -> None:
        if once and held:
            held.clear()
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        else:
            held.append((number, frame))

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not None:
            before[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held_number, _ in held:
            signal.raise_signal(held_number)
