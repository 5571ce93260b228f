"""The commands about the installation: packs and doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_surgery.cli import exits
from moe_surgery.cli.screen import Screen
from moe_surgery.report.words import plural, writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moe_surgery.packs.pack import Pack


def doctor(screen: Screen) -> int:
    """Show what the installation is and what is wrong with it."""
    from moe_surgery.cli.doctor import diagnose

    with screen.progress() as progress:
        progress.phase("examining the installation")
        found = diagnose()
    screen.result(found.render, found.to_json(), found.sentence())
    return found.exit_code


def packs_list(screen: Screen) -> int:
    """Show every installed pack with its rules, in the order in which they are tried."""
    from moe_surgery.packs.registry import load_packs

    _show(screen, load_packs())
    return exits.DONE


def packs_show(screen: Screen, name: str) -> int:
    """Print one pack as it was understood, in the form of its file."""
    from moe_surgery.packs.registry import load_packs

    screen.will_read(name)
    (pack,) = load_packs([name])
    data = {"schema": "moe-surgery/pack/1", "origin": pack.origin, **pack.to_data(), "exit": exits.DONE}
    text = pack.to_toml()

    def render(console: Console) -> None:
        # Not through the console's wrapping: the text is a file, to be read back.
        console.file.write(writable(text, console))

    screen.result(render, data, f"{pack.name} {pack.version}: {plural(len(pack.rules), 'rule')}")
    return exits.DONE


def packs_check(screen: Screen, paths: list[str]) -> int:
    """Read pack files and show them; a bad one is an error with file and line."""
    from moe_surgery.packs.registry import check_packs

    found = check_packs(paths)
    screen.will_read(*(pack.origin.rpartition(":")[0] for pack in found))
    _show(screen, found)
    return exits.DONE


def _show(screen: Screen, packs: Sequence[Pack]) -> None:
    from rich.text import Text

    from moe_surgery.report.terminal import indented

    rules = sum(len(pack.rules) for pack in packs)
    summary = f"{plural(len(packs), 'pack')}, {plural(rules, 'rule')}"

    def render(console: Console) -> None:
        for pack in packs:
            head = Text(writable(f"{pack.name} {pack.version}", console), "bold")
            console.print(head.append(writable(f"  {pack.origin}", console), "not bold dim"), overflow="fold")
            for rule in pack.rules:
                indented(console, f"{rule.full_name}  {rule.summary}", 4, "")
        indented(console, summary, 0, "bold")

    screen.result(render, _data(packs), summary)


def _data(packs: Sequence[Pack]) -> dict[str, Any]:
    listed = [
        {
            "name": pack.name,
            "version": pack.version,
            "summary": pack.summary,
            "origin": pack.origin,
            "rules": [{"name": r.full_name, "summary": r.summary, "origin": r.origin} for r in pack.rules],
        }
        for pack in packs
    ]
    return {"schema": "moe-surgery/packs/1", "packs": listed, "exit": exits.DONE}
