"""What may go wrong in the middle of an operation, to be asked for by name; the rest of the process is as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


def _fails_at(call: int, original: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``original``, raising at its ``call``-th call."""
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError(f"{what} broke")
        return original(*args, **kwargs)

    return function


def _doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x: 2 * original(self, x)


@contextmanager
def faulty(name: str | None) -> Iterator[None]:
    """While this lasts, something fails: reading a block, building, loading or proving one; or one is built wrong."""
    if name is None:
        yield
        return
    from moe_surgery.engine import blocks, ledger, proving, sites, surgery

    places: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
        "reading": (sites, "read", lambda original: _fails_at(1, original, "reading")),
        "building": (surgery, "build", lambda original: _fails_at(2, original, "building")),
        "loading": (ledger.Ledger, "_note", lambda original: _fails_at(40, original, "loading")),
        "proving": (proving, "prove_swapped", lambda original: _fails_at(2, original, "proving")),
        "shared expert doubled": (blocks.SharedExpert, "forward", _doubled),
        "a stale layer": (surgery.LayerBook, "release", lambda original: lambda self, block: None),
    }
    holder, attribute, change = places[name]
    with patch.object(holder, attribute, change(getattr(holder, attribute))):
        yield
