"""Hooks of accelerate's that bring a module's weights in for each call, or take them elsewhere."""

from __future__ import annotations


def moving(hook: object) -> str | None:
    """What to call ``hook``, a module's ``_hf_hook``, if it loads or moves weights; None if it moves inputs only."""
    for one in getattr(hook, "hooks", (hook,)):
        kind = type(one)
        aligned = kind.__module__.startswith("accelerate.") and kind.__name__ == "AlignDevicesHook"
        if not (aligned and getattr(one, "offload", True) is False) and kind.__name__ != "ModelHook":
            return f"accelerate's {kind.__name__}"
    return None
