"""The commands that read a model without its weights: scan, plan, explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.cli import exits
from moe_surgery.cli.options import Choice, Place, Trust
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.report.explanation import Explanation


def scan(screen: Screen, model: str, trust: Trust) -> int:
    """Show every MoE-looking site."""
    import moe_surgery
    from moe_surgery.report.json import scan_data
    from moe_surgery.report.terminal import render, sentence

    with screen.progress() as progress:
        progress.phase(f"reading {model}")
        report = moe_surgery.scan(model, trust_remote_code=trust.trust_remote_code)
    screen.result(lambda console: render(report, console), scan_data(report), sentence(report))
    return exits.DONE


def plan(
    screen: Screen,
    model: str,
    choice: Choice,
    place: Place,
    trust: Trust,
    *,
    save: Path | None,
    check: bool,
    svg: Path | None,
    html: Path | None,
) -> int:
    """Show, and save, what ``apply`` would do."""
    import moe_surgery

    screen.will_write(save, svg, html=html)
    screen.will_read(*(choice.pack or ()))
    with screen.progress() as progress:
        progress.phase(f"reading {model}")
        wanted = {**choice.as_plan(), **place.as_plan()}
        planned = moe_surgery.plan(model, trust_remote_code=trust.trust_remote_code, **wanted)
    # As it was given, so that apply finds it again.
    planned = replace(planned, model=model)
    report = planned.report()
    if save is not None:
        screen.file(save, planned.to_text())
    if check and report.replaced:
        report = report.but(exit_code=exits.CHANGES)
    costs = planned.costs if report.replaced else None
    notes = [] if costs is None else [("costs", costs.sentence())]
    screen.report(report, notes=notes, more={"costs": costs.to_json() if costs else None}, svg=svg)
    return report.exit_code


def explain(screen: Screen, model: str, site: str, trust: Trust, *, packs: list[str] | None, rule: str | None) -> int:
    """Show how one site was read and how every rule held against it."""
    import moe_surgery
    from moe_surgery.report.explanation import render_trail, trail_data, trail_sentence

    screen.will_read(*(packs or ()))
    with screen.progress() as progress:
        progress.phase(f"reading {model}")
        found = moe_surgery.explain(model, site, packs=packs, trust_remote_code=trust.trust_remote_code)
    if rule is not None:
        found = _only(found, rule)
    screen.result(lambda console: render_trail(found, console), trail_data(found), trail_sentence(found))
    return exits.DONE


def _only(explanation: Explanation, name: str) -> Explanation:
    trails = tuple(pair for pair in explanation.trails if name in (pair[0].full_name, pair[0].name))
    if explanation.spec is not None and not trails:
        known = ", ".join(rule.full_name for rule, _ in explanation.trails)
        raise UsageError(f'no rule is named "{name}" (there are {known})')
    return replace(explanation, trails=trails)
