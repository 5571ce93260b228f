"""JSON as this library writes it: strict, stable, the same for the same values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_surgery.report.outcomes import Outcomes


def scan_data(report: Outcomes) -> dict[str, Any]:
    """JSON-ready data of the versioned schema ``moe-surgery/scan/1`` for what ``scan`` returned."""
    sites = [
        {
            "path": step.path,
            "kind": step.kind,
            "readable": step.outcome == "kept",
            "reason": step.reason,
            "spec": step.spec.to_json() if step.spec else None,
        }
        for step in report.steps
    ]
    return {
        "schema": "moe-surgery/scan/1",
        "model": report.model,
        "versions": dict(report.versions),
        "sites": sites,
        "seconds": round(report.seconds, 3),
        "exit": 0,
    }


def dumps(data: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """``data`` as indented JSON with a last newline. Raises :class:`ValueError` for a number that JSON hasn't."""
    return json.dumps(data, indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def loads(text: str) -> Any:
    """What JSON says. Raises :class:`ValueError` if it isn't, or has a number that JSON hasn't, or no float can be."""

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no number here")
        return value

    return json.loads(text, parse_float=number, parse_constant=number)
