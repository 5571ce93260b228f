"""The weight map: which of a block's tensors go where in the canonical weights."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.report.pictures.svg import MONO, drawing, element, fitted, label
from moe_surgery.spec import MoESpec
from moe_surgery.weights.routes import Route

_ROW, _TALL = 26.0, 44.0


def weight_map(spec: MoESpec, weights: Sequence[Route], width: float) -> str:
    """A line for each route, from the block's own tensors to the weights that every target is built from."""
    narrow = width < 600
    row = _TALL if narrow else _ROW
    parts = []
    begin, end = 0.5 * width, 0.6 * width
    for number, route in enumerate(weights):
        y = row * number + row / 2
        source = route.source + route.part
        shape = _shape(spec, route.sink)
        if narrow:
            parts.append(label(0, y - 3, fitted(source, width, 12, MONO), "m"))
            parts.append(_arrow(2, 22, y + 10))
            parts.append(label(32, y + 14, fitted(f"{route.sink} {shape}", width - 32, 12, MONO), "m q"))
            continue
        parts.append(label(0, y + 4, fitted(source, begin - 12, 12, MONO), "m"))
        parts.append(_arrow(begin, end, y))
        parts.append(label(end + 14, y + 4, route.sink, "m b"))
        parts.append(label(width, y + 4, shape, "m q", "end"))
    told = "; ".join(f"{route.source} to {route.sink}" for route in weights)
    return drawing(width, row * len(weights), told, *parts)


def _arrow(start: float, end: float, y: float) -> str:
    line = element("line", x1=start, x2=end - 5, y1=y, y2=y, class_="flow")
    return line + element("path", d=f"M{end:.1f} {y:.1f}l-7 -3.5v7z", class_="tip")


def _shape(spec: MoESpec, sink: str) -> str:
    """The canonical weight's shape, as ``BlockTensors`` has it."""
    e, h, i = spec.experts.num_experts, spec.hidden, spec.experts.width
    inner = spec.inner
    s = spec.shared.width if spec.shared else 0
    rows = 2 * i if spec.experts.gated else i
    shapes = {
        "router": (spec.router.num_experts, h),
        "router bias": (spec.router.num_experts,),
        "correction bias": (spec.router.num_experts,),
        "w13": (e, rows, inner),
        "w13 gate rows": (e, rows, inner),
        "w13 up rows": (e, rows, inner),
        "w2": (e, inner, i),
        "w13 bias": (e, rows),
        "w13 bias, up rows": (e, rows),
        "w2 bias": (e, inner),
        "shared gate_proj": (s, h),
        "shared in_proj": (s, h),
        "shared up_proj": (s, h),
        "shared down_proj": (h, s),
        "shared gate": (1, h),
        "output bias": (h,),
    }
    return "[" + ", ".join(map(str, shapes[sink])) + "]"
