"""Runs at the start of every Python process of a run, since its folder then stands first on PYTHONPATH.

It gives way to the sitecustomize that would have run otherwise, and lets transformers be hooked if it is imported. It
imports nothing of this library before that, and runs in whatever Python a command starts, old ones too.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from typing import Any

WATCHED = "transformers.modeling_utils"


def run_next() -> None:
    """Run the sitecustomize further along the path, if there is one, in this one's place."""
    here = os.path.realpath(os.path.dirname(__file__))
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.realpath(entry) != here])
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


class Watch:
    """A finder that finds nothing by itself: it has the watched module hooked after its import, then retires."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self.hook_after(spec.loader)
        return spec

    def hook_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            # A loader may serve several modules; and the same module may have been looked for before.
            if module.__name__ == WATCHED and self in sys.meta_path:
                sys.meta_path.remove(self)
                hook()

        loader.exec_module = exec_module


def hook() -> None:
    try:
        from moe_surgery.engine.launch.from_pretrained import hook_as_ordered
    except ImportError as error:
        raise RuntimeError(
            f"surgery was asked for, but moe-surgery can't be imported by {sys.executable} ({error}); install it there"
        ) from error
    hook_as_ordered()


try:
    run_next()
finally:
    if "MOE_SURGERY_ORDERS" in os.environ:
        if WATCHED in sys.modules:
            hook()
        else:
            sys.meta_path.insert(0, Watch())
