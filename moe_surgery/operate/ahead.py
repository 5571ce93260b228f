"""Probes made ahead: those of the next block on another thread, while the one before is asked.

Making them takes the CPU alone, asking a block on a GPU takes the GPU and the launching thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from moe_surgery.prove.probe import Probes

Make = Callable[[str], Probes | None]
"""The probes of the block at a path; None for one whose probes are made when it is asked."""


class ProbesAhead:
    """The probes of the blocks at ``paths``, which are asked for in this order. For ``with``."""

    def __init__(self, paths: Sequence[str], make: Make) -> None:
        self._make, self._left = make, list(reversed(paths))
        self._next: tuple[str, Future[Probes | None]] | None = None
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(self, path: str) -> Probes | None:
        """The probes of the block at ``path``; those of the next are begun. Raises what making them raised."""
        assert self._next is not None and self._next[0] == path
        future = self._next[1]
        self._begin()
        return future.result()

    def _begin(self) -> None:
        path = self._left.pop() if self._left else None
        self._next = None if path is None else (path, self._pool.submit(self._made, path))

    def _made(self, path: str) -> Probes | None:
        with torch.no_grad():
            return self._make(path)
