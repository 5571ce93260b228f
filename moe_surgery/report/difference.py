"""What differs between two reports: by site, in what was decided and in what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_surgery.report.folded_paths import fold_paths
from moe_surgery.report.outcomes import Outcomes, Step
from moe_surgery.report.terminal import indented
from moe_surgery.report.words import plural, ratio

if TYPE_CHECKING:
    from rich.console import Console

MARGIN = 2.0
"""A margin that changed by less than this factor is the same: it is a ratio of roundings."""
_NOTHING = "none"


@dataclass(frozen=True)
class Record:
    """A report as it was stored. ``speeds`` has what was timed, by a name of it: ratio of the times and its spread."""

    name: str
    report: Outcomes
    speeds: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Change:
    """``what`` of the site at ``path`` was ``before`` and is ``after``. Of a speed, ``path`` says what was timed."""

    path: str
    what: str
    before: str
    after: str


def changes(old: Record, new: Record) -> tuple[Change, ...]:
    """Every difference, in the order of the model's sites; speeds last.

    Speeds differ where their ratios are further apart than their spreads together; without spreads nothing is said.
    Margins are compared unless one of the two is a plan or a scan, which has none.
    """
    before, after = ({step.path: step for step in record.report.steps} for record in (old, new))
    found = [change for path in {**before, **after} for change in _changes(path, before.get(path), after.get(path))]
    if any(record.report.done in ("planned", "scanned") for record in (old, new)):
        found = [change for change in found if change.what != "margin"]
    return (*found, *_speeds(old.speeds, new.speeds))


def _changes(path: str, old: Step | None, new: Step | None) -> Iterator[Change]:
    if old is None or new is None:
        yield Change(path, "site", *("there" if step else "absent" for step in (old, new)))
        return
    told = (
        ("outcome", old.outcome, new.outcome),
        ("reason", *_reasons(old, new)),
        ("class", old.kind, new.kind),
        ("spec", *(step.spec.sentence() if step.spec else _NOTHING for step in (old, new))),
        ("rule", old.rule or _NOTHING, new.rule or _NOTHING),
        ("target", old.target or _NOTHING, new.target or _NOTHING),
    )
    for what, before, after in told:
        if before != after:
            yield Change(path, what, before, after)
    # What a sentence of a spec doesn't say: which of its numbers are kept in float32, say.
    if old.spec and new.spec and old.spec != new.spec and old.spec.sentence() == new.spec.sentence():
        yield Change(path, "spec", *_apart(old.spec.to_json(), new.spec.to_json()))
    yield from _margins(path, old, new)


def _reasons(old: Step, new: Step) -> tuple[str, str]:
    """The reasons, where they are not the numbers of a proof, which differ from run to run."""
    measured = any(step.verdict is not None or step.outcome == "replaced" for step in (old, new))
    return ("", "") if measured and old.outcome == new.outcome else (old.reason, new.reason)


def _apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    """The fields that differ, as text."""
    sides: tuple[list[str], list[str]] = ([], [])
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _apart(before, after)
            for side, text in zip(sides, inner, strict=True):
                side.append(text)
        else:
            sides[0].append(f"{key} {before}")
            sides[1].append(f"{key} {after}")
    return ", ".join(sorted(sides[0])), ", ".join(sorted(sides[1]))


def _margins(path: str, old: Step, new: Step) -> Iterator[Change]:
    margins = [None if step.verdict is None else step.verdict.margin for step in (old, new)]
    before, after = margins
    if before is None or after is None:
        if margins != [None, None]:
            yield Change(path, "margin", *(_NOTHING if margin is None else ratio(margin) for margin in margins))
        return
    low, high = sorted((before, after))
    if low != high and (low <= 0 or high / low > MARGIN):
        yield Change(path, "margin", ratio(before), ratio(after))


def _speeds(
    old: Mapping[str, tuple[float, float | None]], new: Mapping[str, tuple[float, float | None]]
) -> Iterator[Change]:
    for name in (name for name in old if name in new):
        (before, around), (after, spread) = old[name], new[name]
        if around is not None and spread is not None and abs(before - after) > around + spread:
            yield Change(name, "speed", f"{ratio(before)} ± {around:.2g}", f"{ratio(after)} ± {spread:.2g}")


def render_difference(old: str, new: str, found: Sequence[tuple[str, Sequence[Change]]], console: Console) -> None:
    """Print the changes of each pair of records, those that are the same at several sites together."""
    indented(console, f"{old} → {new}", 0, "bold")
    for name, listed in found:
        if name and listed:
            indented(console, name, 0, "bold")
        for (what, before, after), paths in _folded(listed).items():
            indented(console, ", ".join(paths), 0, "")
            indented(console, f"{before} → {after}", 13, "", hanging=f"    {what}")
    indented(console, difference_sentence(found), 0, "bold")


def _folded(listed: Sequence[Change]) -> dict[tuple[str, str, str], list[str]]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for change in listed:
        groups.setdefault((change.what, change.before, change.after), []).append(change.path)
    return {key: [path or "the root module" for path, _ in fold_paths(paths)] for key, paths in groups.items()}


def difference_sentence(found: Sequence[tuple[str, Sequence[Change]]]) -> str:
    """In one line: ``3 sites differ: 3 in outcome, 3 in reason``."""
    listed = [change for _, changes in found for change in changes]
    sites = {(name, change.path) for name, changes in found for change in changes if change.what != "speed"}
    kinds = {what: sum(change.what == what for change in listed) for what in dict.fromkeys(c.what for c in listed)}
    if not listed:
        return "no difference"
    told = ", ".join(f"{count} in {what}" for what, count in kinds.items())
    return f"{plural(len(sites), 'site')} {'differs' if len(sites) == 1 else 'differ'}: {told}"


def difference_data(
    old: str, new: str, found: Sequence[tuple[str, Sequence[Change]]], exit_code: int
) -> dict[str, Any]:
    """JSON-ready data of the versioned schema ``moe-surgery/diff/1``."""
    listed = [
        {"record": name, "path": change.path, "what": change.what, "before": change.before, "after": change.after}
        for name, changes in found
        for change in changes
    ]
    return {"schema": "moe-surgery/diff/1", "old": old, "new": new, "changes": listed, "exit": exit_code}
