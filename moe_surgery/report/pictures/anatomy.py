"""What is in a block, drawn from its spec: as the model has it, and as it is once replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from moe_surgery.report.pictures.svg import MONO, drawing, element, fitted, label
from moe_surgery.spec import MoESpec, SharedSpec
from moe_surgery.weights.routes import Route

WIDTH = 440.0
_LEFT, _RIGHT, _HEAD, _GAP = 52.0, 350.0, 42.0, 18.0
_LINE, _CHARS = 16.0, 44
_SLOTS = 16


@dataclass(frozen=True)
class _Part:
    """A box: what it is, what it computes, whose weights, whether surgery exchanges it, and how it joins the sum."""

    name: str
    lines: tuple[str, ...]
    weights: str
    exchanged: bool
    joins: str
    chosen: tuple[int, int] | None = None

    @property
    def height(self) -> float:
        return 24 + _LINE * (len(self.lines) + bool(self.weights)) + (16 if self.chosen else 0)


def before(spec: MoESpec, weights: Sequence[Route], name: str) -> str:
    """The block as the model has it, under ``name``."""
    return _drawn(name, _parts(spec, weights, None), framed=False)


def after(spec: MoESpec, weights: Sequence[Route], target: str) -> str:
    """The same once it is replaced by what ``target`` builds; what surgery exchanges is framed."""
    return _drawn(f"after: {target}", _parts(spec, weights, target), framed=True)


def _parts(spec: MoESpec, weights: Sequence[Route], target: str | None) -> list[_Part]:
    router, experts, shared = spec.router, spec.experts, spec.shared
    whole = spec.at == "block"
    sources: dict[str, str] = {}
    for route in weights:
        sources.setdefault(route.sink, route.source + route.part)
    own = target is None
    names = {
        "router": sources.get("router", "") if own else "router",
        "experts": sources.get("w13 gate rows", sources.get("w13", "")) if own else "w13, w2",
        "shared": sources.get("shared gate_proj", sources.get("shared in_proj", "")) if own else "shared expert",
    }
    routing = _wrapped(spec.sentence().split(" · ")[0] if whole else "as it was: outside of what is replaced")
    found = [_Part("router", routing, names["router"] if whole else "", whole, "")]
    size = f"{spec.inner}→{experts.width}→{spec.inner}, {experts.mix}" + (", biases" if experts.biases else "")
    lines = [size]
    if experts.weights_on == "input":
        lines.append("routing weights on their inputs")
    if experts.identities:
        lines.append(f"and {experts.identities} that return their input")
    if experts.empty:
        lines.append(f"and {experts.empty} ids for none of them")
    chosen = (router.top_k, experts.num_experts) if whole else None
    count = f"{experts.num_experts} routed experts"
    found.append(_Part(count, tuple(lines), names["experts"], True, "Σ", chosen))
    if shared is not None:
        found.append(_shared(spec, shared, names["shared"], folded=target == "folded"))
    return found


def _shared(spec: MoESpec, shared: SharedSpec, weights: str, *, folded: bool) -> _Part:
    lines = [f"{spec.hidden}→{shared.width}→{spec.hidden}, {shared.mix}"]
    if shared.gate:
        lines.append(f"times its {shared.gate} gate")
    if shared.scale != 1.0:
        lines.append(f"times {shared.scale:g}")
    if folded:
        return _Part("shared expert, folded", (*lines, "computed among the routed experts"), "", True, "Σ")
    return _Part("shared expert", tuple(lines), weights, True, "+")


def _drawn(head: str, parts: Sequence[_Part], *, framed: bool) -> str:
    y = _HEAD
    tops = []
    for part in parts:
        tops.append(y)
        y += part.height + _GAP
    bottom = y - _GAP
    middles = [top + part.height / 2 for top, part in zip(tops, parts, strict=True)]
    stem, out = 34.0, 392.0
    drawn = [label(0, 14, fitted(head, WIDTH, 13), "b")]
    end = middles[1] if len(parts) == 2 else (middles[1] + middles[2]) / 2
    drawn.append(element("path", d=f"M18 {end:.1f}H{stem:.0f}V{middles[0]:.1f}H{_LEFT:.0f}", class_="flow"))
    drawn.append(label(6, end + 4, "x", "m"))
    for top, part, middle in zip(tops, parts, middles, strict=True):
        if middle != middles[0]:
            drawn.append(element("path", d=f"M{stem:.0f} {end:.1f}V{middle:.1f}H{_LEFT:.0f}", class_="flow"))
        drawn.append(_tip(_LEFT, middle))
        drawn.append(_box(part, top))
    # The router's weights meet the experts' outputs.
    drawn.append(element("path", d=f"M{_RIGHT:.0f} {middles[0]:.1f}H370V{middles[1] - 11:.1f}", class_="flow"))
    drawn.append(element("path", d=f"M370 {middles[1] - 10:.1f}l-3.5 -7h7z", class_="tip"))
    drawn.append(element("path", d=f"M{_RIGHT:.0f} {middles[1]:.1f}H{out:.0f}V{end:.1f}", class_="flow"))
    drawn.append(_node(370, middles[1], "×"))
    for middle in middles[2:]:
        drawn.append(element("path", d=f"M{_RIGHT:.0f} {middle:.1f}H{out:.0f}V{end:.1f}", class_="flow"))
    drawn.append(element("path", d=f"M{out:.0f} {end:.1f}H422", class_="flow"))
    drawn.append(_node(out, end, "Σ"))
    drawn.append(_tip(424, end))
    drawn.append(label(428, end + 4, "y", "m"))
    if framed:
        first = next(top for top, part in zip(tops, parts, strict=True) if part.exchanged)
        far = 410 if parts[0].exchanged else _RIGHT + 8
        drawn.append(
            element(
                "rect",
                x=_LEFT - 9,
                y=first - 9,
                width=far - _LEFT + 9,
                height=bottom - first + 18,
                rx=8,
                class_="frame",
            )
        )
    return drawing(WIDTH, bottom + 12, head, *drawn)


def _box(part: _Part, top: float) -> str:
    width = _RIGHT - _LEFT
    drawn = [element("rect", x=_LEFT, y=top, width=width, height=part.height, rx=5, class_="box")]
    y = top + 18
    drawn.append(label(_LEFT + 12, y, part.name, "b"))
    if part.chosen:
        drawn.append(_slots(part.chosen, y + 7))
        y += 16
    for line in part.lines:
        y += _LINE
        drawn.append(label(_LEFT + 12, y, fitted(line, width - 20, 12), "s"))
    if part.weights:
        y += _LINE
        drawn.append(label(_LEFT + 12, y, fitted(part.weights, width - 20, 12, MONO), "m q"))
    return element("g", *drawn)


def _slots(chosen: tuple[int, int], y: float) -> str:
    """The experts as slots, the top-k filled; of more than fit, the share of those that are chosen is kept."""
    k, count = chosen
    slots = min(count, _SLOTS)
    filled = k if slots == count else max(1, round(k * slots / count))
    return "".join(
        element(
            "rect", x=_LEFT + 12 + 14 * n, y=y, width=11, height=8, rx=1.5, class_="good" if n < filled else "hollow"
        )
        for n in range(slots)
    ) + label(_LEFT + 18 + 14 * slots, y + 8, f"{k} of {count}", "s q")


def _node(x: float, y: float, sign: str) -> str:
    return element("circle", cx=x, cy=y, r=10, class_="hollow") + label(x, y + 4.5, sign, "s", "middle")


def _tip(x: float, y: float) -> str:
    return element("path", d=f"M{x:.1f} {y:.1f}l-7 -3.5v7z", class_="tip")


def _wrapped(text: str) -> tuple[str, ...]:
    return tuple(wrap(text, _CHARS))
