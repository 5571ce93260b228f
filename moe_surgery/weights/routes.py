"""Which tensors of a block fill which of the canonical weights: what a report shows of a layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_surgery.weights.layout import Layout, MLPPieces, Piece

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Route:
    """``source``, a tensor of the block or, as ``experts.{0..127}.w1``, one for each of ``count`` experts, to ``sink``.

    ``part`` is which part of the source is meant, such as ``[e, 0:384]``; empty for the whole of it.
    """

    source: str
    part: str
    sink: str
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def routes(layout: Layout) -> tuple[Route, ...]:
    """A route for each role, routed experts taken together, in the order of the canonical weights."""
    return tuple(_routes(layout))


def _routes(layout: Layout) -> Iterator[Route]:
    for piece, sink in (
        (layout.router if layout.router.path else None, "router"),
        (layout.router_bias, "router bias"),
        (layout.correction_bias, "correction bias"),
    ):
        yield from _alone(piece, sink)
    first = layout.experts[0]
    gated = first.up != first.gate
    names = [("gate", "w13 gate rows" if gated else "w13"), *([("up", "w13 up rows")] if gated else []), ("down", "w2")]
    names += [
        ("gate_bias", "w13 bias"),
        *([("up_bias", "w13 bias, up rows")] if gated else []),
        ("down_bias", "w2 bias"),
    ]
    for name, sink in names:
        pieces = [getattr(expert, name) for expert in layout.experts]
        if all(piece is not None for piece in pieces):
            yield _together(pieces, sink)
    if layout.shared is not None:
        yield from _shared(layout.shared)
    yield from _alone(layout.shared_gate, "shared gate")
    yield from _alone(layout.output_bias, "output bias")


def _shared(mlp: MLPPieces) -> Iterator[Route]:
    yield from _alone(mlp.gate, "shared gate_proj" if mlp.up != mlp.gate else "shared in_proj")
    yield from _alone(None if mlp.up == mlp.gate else mlp.up, "shared up_proj")
    yield from _alone(mlp.down, "shared down_proj")


def _alone(piece: Piece | None, sink: str) -> Iterator[Route]:
    if piece is not None:
        yield Route(piece.path, str(piece).removeprefix(piece.path), sink)


def _together(pieces: Sequence[Piece], sink: str) -> Route:
    """One route for the experts' pieces: of one stacked tensor, or of a tensor each."""
    paths = list(dict.fromkeys(piece.path for piece in pieces))
    parts = {_part(piece) for piece in pieces}
    part = parts.pop() if len(parts) == 1 else "[…]"
    folded = {_NUMBER.sub("*", path) for path in paths}
    if len(paths) == 1:
        return Route(paths[0], part, sink)
    last = f"{{0..{len(paths) - 1}}}"
    runs = len(folded) == 1 and paths == [_NUMBER.sub(str(number), paths[0], count=1) for number in range(len(paths))]
    source = _NUMBER.sub(last, paths[0], count=1) if runs else f"{paths[0]} and {len(paths) - 1} more"
    return Route(source, part, sink, len(paths))


def _part(piece: Piece) -> str:
    text = str(piece).removeprefix(piece.path)
    return text if piece.index is None else text.replace(f"[{piece.index}]", "[e]", 1)
