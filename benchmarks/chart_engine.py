"""The chart of engine.py's results as SVG: how many times as fast as without surgery, by the size of a step."""

from __future__ import annotations

from typing import Any

from chart import COLOURS, text

WIDTH, BAR, LEFT, TOP, GAP = 560, 16, 150, 76, 14
_SCALE = 3.0
"""The ratio at the right edge."""


def draw(result: dict[str, Any]) -> str:
    """Bars of the ratios of medians, with a line over what eight in ten turns' ratios lie within."""
    rows = [row for row in result["rows"] if row["impl"] != "without" and row["mode"] != "startup"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        size = f"{row['sequences']} sequences" if row["mode"] == "decode" else f"{row['tokens']} tokens"
        groups.setdefault(f"{row['mode']}, {size}", []).append(row)
    highest = max(_SCALE, *(row["wall_ratio"] + row["wall_ratio_spread"] for row in rows))

    def x_of(value: float) -> float:
        return LEFT + value / highest * WIDTH

    height = TOP + sum(len(group) * BAR + GAP for group in groups.values()) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        text(20, 20, f"A vLLM engine with surgery, against itself without: {result['machine']['gpu']}", 14),
        text(20, 38, "decode: device time of a step; prefill: wall time", 11),
    ]
    bottom = height - 40
    for tick in range(int(highest) + 1):
        stroke = "#888" if tick == 1 else "#ddd"
        parts.append(f'<path d="M{x_of(tick):.1f} {TOP - 8}V{bottom}" stroke="{stroke}"/>')
        parts.append(text(x_of(tick), bottom + 14, f"{tick}×", 11, "middle"))
    y = TOP
    for name, group in groups.items():
        parts.append(text(LEFT - 8, y + len(group) * BAR / 2 + 4, name, 12, "end"))
        for row in group:
            kind = "device" if row["mode"] == "decode" else "wall"
            value, half = row[f"{kind}_ratio"], row[f"{kind}_ratio_spread"]
            wide = x_of(value) - LEFT
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR - 3}" fill="{COLOURS[row["impl"]]}"/>'
            )
            middle = y + (BAR - 3) / 2
            parts.append(f'<path d="M{x_of(value - half):.1f} {middle}H{x_of(value + half):.1f}" stroke="#000"/>')
            parts.append(text(x_of(value + half) + 4, middle + 4, f"{value:.2f}", 10))
            y += BAR
        y += GAP
    for number, impl in enumerate(dict.fromkeys(row["impl"] for row in rows)):
        x = LEFT + number * 125
        parts.append(f'<rect x="{x}" y="{height - 18}" width="12" height="12" fill="{COLOURS[impl]}"/>')
        parts.append(text(x + 18, height - 8, impl, 12))
    return "\n".join([*parts, "</svg>"]) + "\n"
