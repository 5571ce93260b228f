"""A report from its JSON, as another process left it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moe_surgery.errors import UsageError
from moe_surgery.prove.verdict import Family, Mutant, Verdict
from moe_surgery.report.outcomes import SCHEMA, Memory, ModelCheck, Outcomes, Step
from moe_surgery.report.report import Report
from moe_surgery.report.typed import check_types
from moe_surgery.spec import MoESpec


def report_from_json(data: Mapping[str, Any]) -> Report:
    """The report that ``Report.to_json`` gave ``data`` for; numbers that JSON has as null are infinite.

    A block's error alone stays unknown then, as null also says that none was measured. Raises :class:`UsageError` if
    ``data`` isn't a report.
    """
    if data.get("schema") != SCHEMA:
        raise UsageError(f"not a report of schema {SCHEMA}: {data.get('schema')}")
    try:
        report = Report(
            model=data["model"],
            done=data["done"],
            steps=tuple(_step(site) for site in data["sites"]),
            fingerprint=data["fingerprint"],
            versions=dict(data["versions"]),
            seconds=data["seconds"],
            memory=Memory(**data["memory"]),
            exit_code=data["exit"],
            phases=tuple(data.get("phases", {}).items()),
            model_check=None if data.get("model_check") is None else ModelCheck.from_json(data["model_check"]),
        )
        check_types(report, Outcomes)
        return report
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"not a report: {error!r}") from error


def _step(site: Mapping[str, Any]) -> Step:
    spec = None if site["spec"] is None else MoESpec.from_json(site["spec"])
    verdict = None if site["proof"] is None else _verdict(site["proof"])
    return Step.from_json(site, spec, verdict)


def _verdict(proof: Mapping[str, Any]) -> Verdict:
    numbers = {
        **_known(Verdict, proof),
        "mutants": tuple(Mutant(**_known(Mutant, mutant)) for mutant in proof["mutants"]),
        "families": tuple(Family(**_known(Family, family)) for family in proof["families"]),
    }
    return Verdict(**numbers)


def _known(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that are in ``data``."""
    names = [field.name for field in fields(kind) if field.name in data]
    return {name: math.inf if data[name] is None and name != "build_error" else data[name] for name in names}
