"""One operation at a time: two threads that operate on one model would each put its own blocks over the other's."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_LOCK = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def alone(verb: Callable[P, R]) -> Callable[P, R]:
    """``verb``, which waits until no other thread of the process is within such a verb."""

    @functools.wraps(verb)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return verb(*args, **kwargs)

    return waiting
