"""The command that tries packs on the tiny models of all families."""

from __future__ import annotations

import time
from pathlib import Path

from moe_surgery.cli.screen import Screen


def packs_test(
    screen: Screen,
    packs: list[str] | None,
    families: list[str] | None,
    settings: list[str] | None,
    *,
    strict: bool,
    markdown: Path | None,
    cuda: Path | None,
    published: Path | None,
) -> int:
    """Build, operate, prove, compare and undo every family's model, and show the coverage table."""
    from moe_surgery.packs.registry import load_packs
    from moe_surgery.testing import table
    from moe_surgery.testing.coverage import Coverage, choose, cover
    from moe_surgery.testing.families import DEFAULT
    from moe_surgery.testing.on_cuda import OnCuda
    from moe_surgery.testing.published import Published

    as_published = None if published is None else Published.read(published)
    on_cuda = None if cuda is None else OnCuda.read(cuda)
    screen.will_write(markdown)
    screen.will_read(*(packs or ()), cuda, published)
    started = time.perf_counter()
    chosen = load_packs(packs or None)
    cases = choose(chosen, families or (), settings or (DEFAULT,))
    with screen.progress() as progress:
        progress.phase(f"trying {len(cases)} models")
        tried = tuple(cover(chosen, cases, progress.step))
    coverage = Coverage(tuple(pack.name for pack in chosen), tried, time.perf_counter() - started, strict)
    if markdown is not None:
        screen.file(markdown, table.markdown(coverage, on_cuda, as_published))
    screen.result(lambda console: table.render(coverage, console), coverage.to_json(), table.sentence(coverage))
    wrong = [one for one in tried if not one.trial.right]
    if wrong:
        screen.say(f"error: {len(wrong)} of {len(tried)} models are wrong, first {wrong[0].family} {wrong[0].setting}")
    return coverage.exit_code
