"""What a block can be replaced with. A target is built from a :class:`~moe_surgery.spec.MoESpec` and its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_surgery.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from moe_surgery.targets.base import Target

NAMES = ("auto", "folded", "vllm", "reference")


def check_name(name: str) -> None:
    """Raise :class:`UsageError` if no target is named so."""
    if name not in NAMES:
        raise UsageError(f"no target is named {name!r} (there are {', '.join(NAMES)})")


def get_target(name: str) -> Target:
    """The target of that name; "auto" chooses for each block, see :mod:`moe_surgery.targets.auto`."""
    check_name(name)
    if name == "auto":
        from moe_surgery.targets.auto import AutoTarget

        return AutoTarget()
    if name == "folded":
        from moe_surgery.targets.folded.target import FoldedTarget

        return FoldedTarget()
    if name == "vllm":
        from moe_surgery.targets.vllm import VllmTarget

        return VllmTarget()
    from moe_surgery.targets.reference_target import ReferenceTarget

    return ReferenceTarget()


def installed_engine() -> str:
    """The engine that hosts the "vllm" target, in words. Imports it.

    Raises :class:`~moe_surgery.errors.UnsupportedError` if it is missing, of no known era, or of one that isn't built
    for.
    """
    from moe_surgery.targets.vllm.eras import detect

    installed = detect()
    era = installed.era
    text = f"vLLM {installed.version}, era {era.name} ({era.releases}), {era.layer}"
    if era.builder is None:
        raise UnsupportedError(f"{text}: recognised, but not supported")
    return text if era.engines else f"{text}: in plain models only"
