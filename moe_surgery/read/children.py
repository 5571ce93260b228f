"""What a reading says of the block's children, as rules put it: the formula that combines them, and their shapes."""

from __future__ import annotations

from collections.abc import Iterable

from moe_surgery.read.reading import ChildShape
from moe_surgery.spec import MoESpec
from moe_surgery.weights.layout import Layout, Piece


def combine(spec: MoESpec, layout: Layout) -> str:
    """The block's output as a formula over its children."""
    experts, shared, gate = _names(layout)
    text = experts if spec.router.scale == 1.0 else f"{spec.router.scale:g} * {experts}"
    if spec.shared is None:
        return text
    factors = [f"{spec.shared.scale:g}"] if spec.shared.scale != 1.0 else []
    factors += [f"sigmoid({gate})"] if gate else []
    return f"{text} + {' * '.join([*factors, shared])}"


def children(spec: MoESpec, layout: Layout) -> tuple[tuple[str, ChildShape], ...]:
    """The shapes of the children that hold the router, the experts, the shared expert and its gate, by name."""
    experts, shared, gate = _names(layout)
    found = []
    if layout.router.path:  # else the router is no matrix
        router = _owner((layout.router,), "router")
        found.append((router, ChildShape("matrix", (spec.router.num_experts, spec.hidden))))
    found.append((experts, ChildShape("experts", (spec.experts.num_experts, spec.experts.width, spec.inner))))
    if spec.shared:
        found.append((shared, ChildShape("mlp", (spec.shared.width, spec.hidden))))
    if gate:
        found.append((gate, ChildShape("matrix", (1, spec.hidden))))
    return tuple(found)


def _owner(pieces: Iterable[Piece], role: str) -> str:
    """The block's child that holds all ``pieces``, or the role's own name if no single child does."""
    names = {piece.path.split(".")[0] for piece in pieces}
    return names.pop() if len(names) == 1 else role


def _names(layout: Layout) -> tuple[str, str, str]:
    experts = _owner((piece for mlp in layout.experts for piece in mlp.pieces() if piece.path), "experts")
    shared = _owner(layout.shared.pieces(), "shared_expert") if layout.shared else ""
    gate = _owner((layout.shared_gate,), "") if layout.shared_gate else ""
    return experts, shared, gate
