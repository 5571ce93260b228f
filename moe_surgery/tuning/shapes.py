"""What of a model is to be tuned: the shapes of its blocks, or of a rank's share of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_surgery.errors import UsageError
from moe_surgery.kernels.arguments import BLOCK
from moe_surgery.kernels.choice import shape_name
from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.fold import folded_terms


@dataclass(frozen=True)
class Shape:
    """A shape by the name of its table, a block that has it, and how many of the model's blocks do."""

    name: str
    spec: MoESpec
    count: int


def shapes(specs: Iterable[MoESpec], dtype: str, ranks: int = 1, *, scaled: bool = False) -> list[Shape]:
    """The shapes of blocks in ``dtype``, each once; of what each of ``ranks`` holds under tensor parallelism.

    ``scaled`` ones have their experts in e4m3 with a scale for each block. Raises :class:`UsageError` where a width
    can't be shared by so many ranks, or isn't made of whole blocks.
    """
    found: dict[str, Shape] = {}
    for spec in specs:
        part = share(spec, ranks)
        if scaled:
            _check_blocks(part)
        name = shape_name(folded_terms(part, dtype, scaled=scaled))
        known = found.get(name, Shape(name, part, 0))
        found[name] = replace(known, count=known.count + 1)
    return list(found.values())


def _check_blocks(spec: MoESpec) -> None:
    for size in spec.sizes:
        if size % BLOCK:
            raise UsageError(f"experts in e4m3 have blocks of {BLOCK}, of which {size} is no multiple")


def share(spec: MoESpec, ranks: int) -> MoESpec:
    """One of ``ranks`` equal parts of the experts' widths."""
    shared = spec.shared
    for width in (spec.experts.width, *([shared.width] if shared else [])):
        if width % ranks:
            raise UsageError(f"experts of width {width} can't be shared by {ranks} ranks")
    part = replace(spec, experts=replace(spec.experts, width=spec.experts.width // ranks))
    return part if shared is None else replace(part, shared=replace(shared, width=shared.width // ranks))
