"""Why one site is read as it is: every rule as a tree of its clauses, with what each wanted and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_surgery.report.figure import plain
from moe_surgery.report.folded_paths import fold_paths
from moe_surgery.report.terminal import indented
from moe_surgery.report.words import plural, writable

if TYPE_CHECKING:
    from moe_surgery.packs.edits import Edit
    from moe_surgery.packs.match import Clue, Match, Miss
    from moe_surgery.packs.pack import Rule
    from moe_surgery.read.reading import ChildShape
    from moe_surgery.spec import MoESpec

# Where a clause stands in a pack: the table of the rule that says it.
_TABLES = {"config": "config", "model_type": "config", "read": "read", "requires": "requires"}
_FIND = "find"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Why a site is, or isn't, matched: what was read there, and every rule's clauses, nearest rule first.

    ``alike`` are the other sites that were read the same. ``edits`` has, by a rule's full name, the smallest change
    that makes it match. Of a site that can't be read, ``unread`` is the reason, and the trails hold only the clauses
    that don't need a reading. Printing it shows all of this.
    """

    path: str
    kind: str
    spec: MoESpec | None
    combine: str | None
    unread: str | None
    trails: tuple[tuple[Rule, Match | Miss], ...]
    children: tuple[tuple[str, ChildShape], ...] = ()
    alike: tuple[str, ...] = ()
    edits: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)

    def render(self, console: Console) -> None:
        """Print what was read and the tree of every rule's clauses."""
        render_trail(self, console)

    def __str__(self) -> str:
        """What :meth:`render` prints, without colours, 100 columns wide."""
        return plain(self.render, 100)

    def __repr__(self) -> str:
        """One short line; printing it shows all."""
        return f"<Explanation: {trail_sentence(self)}>"


def render_trail(explanation: Explanation, console: Console) -> None:
    """Print what was read at the site, then every rule, nearest first, clause by clause; the sentence to quote last."""
    head = Text(writable(explanation.path or "the root module", console), "bold")
    console.print(head.append(writable(f"  {explanation.kind}", console), "not bold dim"), overflow="fold")
    for topic, text in _read(explanation):
        indented(console, text, 10, "", hanging=topic)
    if explanation.unread is not None:
        indented(console, f"not readable: {explanation.unread}", 0, "yellow")
    for rule, found in explanation.trails:
        console.print()
        _rule(rule, found, explanation, console)
    if explanation.trails:
        console.print()
    indented(console, trail_sentence(explanation), 0, "bold")


def _read(explanation: Explanation) -> Iterator[tuple[str, str]]:
    if explanation.spec is not None:
        yield "computes", explanation.spec.sentence()
        if explanation.spec.at == "block":
            yield "ranks by", explanation.spec.router.ranking()
        yield "combines", str(explanation.combine)
    if explanation.children:
        yield "children", " · ".join(f"{name} {shape}" for name, shape in explanation.children)
    if explanation.alike:
        yield "alike", ", ".join(path for path, _ in fold_paths(explanation.alike))


def _rule(rule: Rule, found: Match | Miss, explanation: Explanation, console: Console) -> None:
    count, failed = len(found.trail), sum(not clue.held for clue in found.trail)
    unread = explanation.unread is not None
    verdict = f"{failed} of {plural(count, 'clause')} failed" if failed else "every clause holds"
    if unread:
        verdict = f"{failed} of {plural(count, 'clause')} that need no reading failed" if failed else "would be tried"
    style = "red" if failed else "yellow" if unread else "green"
    mark = "?" if unread and not failed else _mark(not failed)
    head, origin = f"{mark} {rule.full_name}: {verdict}", rule.origin
    if cell_len(f"{head}  {origin}") <= console.width:
        line = Text(writable(head, console), style).append(writable(f"  {origin}", console), "dim")
        console.print(line, highlight=False)
    else:
        console.print(Text(writable(head, console), style), overflow="fold", highlight=False)
        console.print(Text(writable(f"  {origin}", console), "dim"), overflow="fold", highlight=False)
    _tree(found.trail, console)
    changes = explanation.edits.get(rule.full_name, ())
    if changes:
        indented(console, f"it would match with {_lines(changes)}:", 2)
        for edit in changes:
            # Not wrapped: it is there to be copied.
            line = Text(writable(f"      {edit}", console), "bold")
            console.print(line, soft_wrap=True, highlight=False)


def _lines(changes: Sequence[Edit]) -> str:
    return "this line" if len(changes) == 1 else f"these {len(changes)} lines"


def _tree(trail: Sequence[Clue], console: Console) -> None:
    """The clauses under the tables of the rule that say them."""
    tables: dict[str, list[Clue]] = {}
    for clue in trail:
        tables.setdefault(_TABLES.get(clue.clause.partition(".")[0], _FIND), []).append(clue)
    width = max((cell_len(_leaf(clue)) for clue in trail), default=0)
    for at, (table, clues) in enumerate(tables.items()):
        last = at == len(tables) - 1
        held = all(clue.held for clue in clues)
        branch = f"{'└─' if last else '├─'} {_mark(held)} {table}"
        console.print(Text(writable(branch, console), "dim" if held else ""), overflow="fold", highlight=False)
        for number, clue in enumerate(clues):
            stem = "   " if last else "│  "
            end = number == len(clues) - 1
            start = f"{stem}{'└─' if end else '├─'} {_mark(clue.held)} {_leaf(clue).ljust(width)}  "
            _clue(clue, start, stem if end else f"{stem}│", console)


def _clue(clue: Clue, start: str, stem: str, console: Console) -> None:
    """A clause that holds on one line; of one that fails, wanted and measured below each other."""
    indent, start, stem = cell_len(start), writable(start, console), writable(stem, console)
    if clue.held:
        same = clue.wanted == clue.measured
        shown = clue.measured if same else f"{clue.measured}  (wanted {clue.wanted})"
        indented(console, shown, indent, "dim", hanging=start, below=stem)
        return
    indented(console, f"wanted   {clue.wanted}", indent, "", hanging=start, below=stem)
    indented(console, f"measured {clue.measured}", indent, "", hanging=stem, below=stem)


def _leaf(clue: Clue) -> str:
    """A clause's name below its table."""
    table, _, rest = clue.clause.partition(".")
    return rest if rest and table in _TABLES else clue.clause


def trail_sentence(explanation: Explanation) -> str:
    """The finding in one line."""
    path = explanation.path or "the root module"
    if explanation.spec is None:
        return f"{path} can't be read"
    for rule, found in explanation.trails:
        if found:
            return f"{path} is matched by {rule.full_name}"
    if not explanation.trails:
        return f"{path} is matched by no rule"
    nearest, found = explanation.trails[0]
    failed = ", ".join(clue.clause for clue in found.trail if not clue.held)
    return f"{path} is matched by no rule; the nearest is {nearest.full_name}, which fails at {failed}"


def trail_data(explanation: Explanation) -> dict[str, Any]:
    """JSON-ready data of the versioned schema ``moe-surgery/explain/1``."""
    rules = [
        {
            "rule": rule.full_name,
            "origin": rule.origin,
            "held": bool(found),
            "clauses": [_clue_data(clue) for clue in found.trail],
            "edits": [_edit_data(edit) for edit in explanation.edits.get(rule.full_name, ())],
        }
        for rule, found in explanation.trails
    ]
    return {
        "schema": "moe-surgery/explain/1",
        "path": explanation.path,
        "kind": explanation.kind,
        "spec": explanation.spec.to_json() if explanation.spec else None,
        "combine": explanation.combine,
        "children": {name: str(shape) for name, shape in explanation.children},
        "alike": list(explanation.alike),
        "unread": explanation.unread,
        "rules": rules,
        "exit": 0,
    }


def _clue_data(clue: Clue) -> dict[str, Any]:
    return {"clause": clue.clause, "held": clue.held, "wanted": clue.wanted, "measured": clue.measured}


def _edit_data(edit: Edit) -> dict[str, Any]:
    return {"key": edit.key, "value": edit.value, "install": edit.install, "line": str(edit)}


def _mark(held: bool) -> str:
    return "✓" if held else "✗"
