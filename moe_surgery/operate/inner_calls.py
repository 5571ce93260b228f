"""What inside of a site the model calls by itself, past the site: seen in the run before anything is built."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

from torch import nn

from moe_surgery.interrupts import without_interrupts
from moe_surgery.targets.likeness import Elsewhere


@dataclass(eq=False)
class InnerCalls:
    """The modules inside of sites that were called while their site was not, by the site's path.

    Calls of other threads than the watching one don't count.
    """

    _found: dict[str, dict[str, None]] = field(default_factory=dict)
    _running: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def watching(self, sites: Mapping[str, nn.Module]) -> Iterator[None]:
        """Notice calls into ``sites``; afterwards every hook is gone."""
        hooks = []
        try:
            for path, site in sites.items():
                for name, module in site.named_modules():
                    if name:
                        called = partial(self._called, threading.get_ident(), path, name)
                        hooks.append(module.register_forward_pre_hook(called))
            yield
        finally:
            with without_interrupts():
                for hook in hooks:
                    hook.remove()

    @contextmanager
    def through(self, path: str) -> Iterator[None]:
        """While the site at ``path`` runs, what is called in it is called by itself."""
        self._running[path] += 1
        try:
            yield
        finally:
            self._running[path] -= 1

    def unanswered(self, path: str, new: nn.Module) -> str | None:
        """The first of the modules called in the site at ``path`` that can't be called in ``new``, which stands for it.

        None if there is none: a router that is kept goes on answering, as does what has no weights.
        """
        names = self._found.get(path, ())
        return next((name for name in names if isinstance(reduce(getattr, name.split("."), new), Elsewhere)), None)

    def _called(self, watching: int, path: str, name: str, *_: Any) -> None:
        if threading.get_ident() == watching and not self._running[path]:
            self._found.setdefault(path, {})[name] = None
