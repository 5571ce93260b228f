"""Draw the pictures of docs/report.md from a stored result: ``python docs/draw_report.py RESULT.json``.

``moe-surgery apply MODEL --format json --out RESULT.json`` stores one. The last block that was replaced is drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.outcomes import Outcomes
from moe_surgery.report.pictures.anatomy import after, before
from moe_surgery.report.pictures.ladder import ladder
from moe_surgery.report.pictures.strip import strip
from moe_surgery.report.pictures.svg import alone
from moe_surgery.report.pictures.weight_map import weight_map

PLACE = Path(__file__).parent / "pictures"
WIDTH = 860.0


def draw(report: Outcomes) -> dict[str, str]:
    """Pictures by name."""
    step = report.replaced[-1]
    assert step.spec is not None and step.verdict is not None and step.target is not None
    drawn = {
        "strip": strip(report, WIDTH),
        "before": before(step.spec, step.weights, f"before: {step.kind}"),
        "after": after(step.spec, step.weights, step.target),
        "ladder": ladder(step.verdict, WIDTH),
        "weights": weight_map(step.spec, step.weights, WIDTH),
    }
    return {name: alone(picture) for name, picture in drawn.items()}


if __name__ == "__main__":
    for name, text in draw(report_from_json(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))).items():
        (PLACE / f"{name}.svg").write_text(text, encoding="utf-8")
