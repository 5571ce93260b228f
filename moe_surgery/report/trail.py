"""Why one site is read as it is: every rule's clauses, what each wanted and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_surgery.report.plain import plural, writable
from moe_surgery.report.terminal import indented

if TYPE_CHECKING:
    from moe_surgery.find.result import Clue
    from moe_surgery.verbs import Explanation


def render_trail(explanation: Explanation, console: Console) -> None:
    """Print what was read at the site, then every rule, nearest first, clause by clause."""
    head = Text(writable(explanation.path or "the root module", console), "bold")
    console.print(head.append(writable(f"  {explanation.kind}", console), "not bold dim"), overflow="fold")
    if explanation.spec is not None:
        indented(console, explanation.spec.sentence(), 10, "", hanging="computes")
        indented(console, str(explanation.combine), 10, "", hanging="combines")
    else:
        indented(console, f"not readable: {explanation.unread}", 0, "yellow")
    for rule, found in explanation.trails:
        count, failed = len(found.trail), sum(not clue.held for clue in found.trail)
        verdict = f"{failed} of {plural(count, 'clause')} failed" if failed else "every clause holds"
        indented(console, f"{_mark(not failed)} {rule.full_name}: {verdict}", 0, "red" if failed else "green")
        width = max((cell_len(clue.clause) for clue in found.trail), default=0)
        for clue in found.trail:
            start = f"    {_mark(clue.held)} {clue.clause.ljust(width)}  "
            text = f"wanted {clue.wanted}, measured {clue.measured}"
            indented(console, text, cell_len(start), "dim" if clue.held else "", hanging=writable(start, console))
    indented(console, trail_sentence(explanation), 0, "bold")


def trail_sentence(explanation: Explanation) -> str:
    """The finding in one line."""
    path = explanation.path or "the root module"
    if explanation.spec is None:
        return f"{path} can't be read"
    for rule, found in explanation.trails:
        if found:
            return f"{path} is matched by {rule.full_name}"
    nearest = f"; the nearest is {explanation.trails[0][0].full_name}" if explanation.trails else ""
    return f"{path} is matched by no rule{nearest}"


def trail_data(explanation: Explanation) -> dict[str, Any]:
    """JSON-ready data of the versioned schema ``moe-surgery/explain/1``."""
    rules = [
        {
            "rule": rule.full_name,
            "origin": rule.origin,
            "held": bool(found),
            "clauses": [_clue(clue) for clue in found.trail],
        }
        for rule, found in explanation.trails
    ]
    return {
        "schema": "moe-surgery/explain/1",
        "path": explanation.path,
        "kind": explanation.kind,
        "spec": explanation.spec.to_json() if explanation.spec else None,
        "combine": explanation.combine,
        "unread": explanation.unread,
        "rules": rules,
        "exit": 0,
    }


def _clue(clue: Clue) -> dict[str, Any]:
    return {"clause": clue.clause, "held": clue.held, "wanted": clue.wanted, "measured": clue.measured}


def _mark(held: bool) -> str:
    return "✓" if held else "✗"
