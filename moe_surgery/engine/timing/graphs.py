"""A cache of vLLM's whose compiled graphs are an engine's own."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def own_graphs(folder: Path) -> str:
    """A cache in ``folder``, which is made, as ``VLLM_CACHE_ROOT`` takes it: without compiled graphs of other engines.

    What vLLM keeps about classes of models is shared with its usual cache. It finds that out in a process that imports
    all of vLLM, which takes as long as a small engine's start.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    usual = Path(os.environ.get("VLLM_CACHE_ROOT") or f"{cache}/vllm").expanduser().resolve()
    folder.mkdir(parents=True)
    with suppress(OSError):  # vLLM then finds out anew
        known = usual / "modelinfos"
        known.mkdir(parents=True, exist_ok=True)
        (folder / "modelinfos").symlink_to(known, target_is_directory=True)
    return str(folder)
