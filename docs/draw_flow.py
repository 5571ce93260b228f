"""Draws ``flow.svg``, the picture in ``architecture.md``: ``python docs/draw_flow.py``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

OUT = Path(__file__).parent / "flow.svg"
WIDTH, HEIGHT = 1080, 436
STYLE = """
svg { font-family: system-ui, sans-serif; font-size: 13px }
.page { fill: #ffffff } .room { fill: #f3f6fa; stroke: #7a8aa0 } .value { fill: #fdf3dc; stroke: #b58a2a }
.frame { fill: none; stroke: #9aa7b8; stroke-dasharray: 5 4 }
text { fill: #1d2733 } .small { font-size: 11px; fill: #4a5868 } .name { font-weight: 600 }
.arrow { stroke: #4a5868; fill: none; stroke-width: 1.4 } .tip { fill: #4a5868 }
@media (prefers-color-scheme: dark) {
  .page { fill: #12171e } .room { fill: #1d2631; stroke: #61738c } .value { fill: #35290f; stroke: #b58a2a }
  .frame { stroke: #4c5a6c } text { fill: #e4eaf1 } .small { fill: #a9b6c6 }
  .arrow { stroke: #a9b6c6 } .tip { fill: #a9b6c6 }
}
"""


@dataclass(frozen=True)
class Box:
    """A folder (``room``) or what passes between two (``value``), with one or two lines below its name."""

    x: int
    y: int
    width: int
    name: str
    lines: tuple[str, ...] = ()
    kind: str = "room"
    height: int = 66

    def svg(self) -> str:
        rows = [
            f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6"/>'
        ]
        middle = self.x + self.width // 2
        top = self.y + self.height // 2 + 5 - 8 * len(self.lines)
        rows.append(f'<text class="name" x="{middle}" y="{top}" text-anchor="middle">{escape(self.name)}</text>')
        for number, line in enumerate(self.lines, 1):
            y = top + 16 * number
            rows.append(f'<text class="small" x="{middle}" y="{y}" text-anchor="middle">{escape(line)}</text>')
        return "\n".join(rows)


ROOMS = (
    Box(20, 40, 118, "models/", ("opens a model,", "finds its sites")),
    Box(188, 40, 118, "read/record/", ("a run on meta", "tensors, recorded")),
    Box(326, 40, 118, "read/meaning/", ("what each", "operation means")),
    Box(464, 40, 118, "read/parse/", ("router, experts,", "shared expert")),
    Box(632, 48, 104, "MoESpec", ("spec/",), "value", 50),
    Box(786, 40, 118, "planning/", ("what is to be", "done, and why")),
    Box(954, 48, 104, "Plan", ("JSON, reviewed",), "value", 50),
    Box(786, 150, 118, "packs/", ("rules from", "rules/*.toml")),
    Box(188, 270, 118, "weights/", ("gathered by role,", "by reference")),
    Box(326, 270, 118, "targets/", ("build a block", "from a spec")),
    Box(464, 270, 118, "prove/", ("old, new, mutants", "and the reference")),
    Box(602, 270, 118, "operate/", ("all exchanged", "at once, or none")),
    Box(786, 270, 118, "report/", ("what became of", "every site")),
    Box(954, 278, 104, "Report", ("text, JSON, SVG",), "value", 50),
    Box(20, 270, 118, "cli/, verbs.py", ("what people call", "drives all this")),
    Box(188, 368, 118, "tuning/", ("its tile sizes",), "room", 50),
    Box(326, 368, 118, "kernels/", ("our own, in Triton",), "room", 50),
    Box(464, 368, 256, "engine/", ("drives the same inside vLLM's processes",), "room", 50),
    Box(786, 368, 118, "timing/", ("old against new",), "room", 50),
)  # fmt: skip
ARROWS = (
    "M138 73 H188", "M306 73 H326", "M444 73 H464", "M582 73 H632", "M736 73 H786", "M904 73 H954",
    "M845 150 V106", "M138 303 H178", "M306 303 H326", "M444 303 H464", "M582 303 H602",
    "M720 303 H786", "M904 303 H954", "M1006 98 V240 H661 V270", "M684 98 V200 H523 V270", "M684 200 H385 V270",
    "M306 393 H326", "M385 368 V336", "M592 368 V348", "M845 368 V336",
)  # fmt: skip
FRAMES = ((178, 22, 414, 104, "read/"), (178, 252, 552, 96, "one transaction"))


def draw() -> str:
    """The picture as SVG text; it follows the reader's light or dark scheme."""
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>From a model to a report: read, plan, operate, prove, report</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
    ]
    for x, y, width, height, name in FRAMES:
        rows.append(f'<rect class="frame" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>')
        rows.append(f'<text class="small" x="{x + 8}" y="{y + 13}">{name}</text>')
    rows += [f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>' for path in ARROWS]
    rows += [box.svg() for box in ROOMS]
    return "\n".join([*rows, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
