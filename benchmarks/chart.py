"""A small SVG writer for the results of cpu_block.py and block.py: time over tokens, a panel per dtype and mode."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP, FOOT = 300, 260, 64, 76, 70, 76
COLOURS = {
    "eager": "#8a8a8a",
    "batched_mm": "#c9812c",
    "grouped_mm": "#2f6fb3",
    "hand-written": "#7a5ea8",
    "vllm": "#c0392b",
    "folded": "#1e8449",
    "floor": "#bbbbbb",
}


def draw(result: dict[str, Any]) -> str:
    """The chart as SVG text. Both axes are logarithmic, and all panels have the same."""
    rows = result["rows"]
    panels = list(dict.fromkeys((row["dtype"], row["mode"]) for row in rows))
    tokens = sorted({row["tokens"] for row in rows})
    low = 10 ** math.floor(math.log10(min(row["us"] for row in rows)))
    high = 10 ** math.ceil(math.log10(max(row["us"] for row in rows)))

    def x_of(count: int) -> float:
        span = math.log(tokens[-1] / tokens[0]) or 1.0
        return math.log(count / tokens[0]) / span * WIDTH

    def y_of(us: float) -> float:
        return HEIGHT - math.log(us / low) / math.log(high / low) * HEIGHT

    whole = LEFT + len(panels) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {TOP + HEIGHT + FOOT}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        text(LEFT, 20, f"Time of one MoE block, {_machine(result['machine'])}", 14),
        text(LEFT, 38, result["block"], 11),
    ]
    for number, (dtype, mode) in enumerate(panels):
        parts.append(f'<g transform="translate({LEFT + number * (WIDTH + GAP)},{TOP})">')
        parts.append(text(0, -12, dtype if mode == "plain" else f"{dtype}, {mode}", 13))
        for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
            y = y_of(10.0**power)
            parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#ddd"/>')
            parts.append(text(-6, y + 4, f"{10.0 ** (power - 3):g} ms", 11, "end"))
        for count in tokens[:: -(-len(tokens) // 8)]:
            parts.append(text(x_of(count), HEIGHT + 16, str(count), 11, "middle"))
        parts.append(text(WIDTH / 2, HEIGHT + 34, "tokens", 11, "middle"))
        for impl in dict.fromkeys(row["impl"] for row in rows):
            line = [r for r in rows if (r["dtype"], r["mode"], r["impl"]) == (dtype, mode, impl)]
            if not line:
                continue
            parts.append(curve([(x_of(row["tokens"]), y_of(row["us"])) for row in line], COLOURS.get(impl, "#000")))
        parts.append("</g>")
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    for number, impl in enumerate(impls):
        x, y = LEFT + number * min(125, (whole - LEFT) // len(impls)), TOP + HEIGHT + FOOT - 14
        parts.append(f'<path d="M{x} {y - 4}h22" stroke="{COLOURS.get(impl, "#000")}" stroke-width="2.5"/>')
        parts.append(text(x + 28, y, impl, 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"


def text(x: float, y: float, words: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def curve(points: Iterable[tuple[float, float]], colour: str) -> str:
    marked = list(points)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in marked)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in marked)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'
