"""The coverage table as text and as Markdown: one row for each kind of block and each end that it came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_surgery.report.terminal import STYLES, SYMBOLS, indented
from moe_surgery.report.words import duration, plural, ratio, writable
from moe_surgery.testing.families import DEFAULT, families

if TYPE_CHECKING:
    from moe_surgery.report.outcomes import Outcome
    from moe_surgery.testing.coverage import Coverage, Line
    from moe_surgery.testing.on_cuda import OnCuda
from moe_surgery.testing.published import FORMS, Published

COMMAND = "moe-surgery packs test --setting all --markdown docs/coverage.md"
ON_CUDA = " --cuda benchmarks/results/h100-families.json"
AS_PUBLISHED = " --published benchmarks/results/published-families.json"


@dataclass(frozen=True)
class Group:
    """Settings of a family in which a kind of block came to one end; ``of`` is how many settings were tried.

    ``spec`` and ``paths`` are those of the first setting; ``margin`` is the least of them all.
    """

    family: str
    block: str
    paths: tuple[str, ...]
    outcome: Outcome
    reason: str | None
    spec: str | None
    margin: float | None
    settings: tuple[str, ...]
    of: int

    @property
    def where(self) -> str:
        """The settings in words: all of them, or their names."""
        if len(self.settings) == self.of:
            return f"all {self.of}" if self.of > 1 else self.settings[0]
        return ", ".join(self.settings)


def groups(coverage: Coverage) -> tuple[Group, ...]:
    """The lines of ``coverage``, settings that ended alike put together, in the order in which they were tried."""
    found: dict[tuple[str, str, str, str | None], list[Line]] = {}
    for line in coverage.lines:
        found.setdefault((line.family, line.block, line.outcome, line.reason), []).append(line)
    tried: dict[str, set[str]] = {}
    for one in coverage.tried:
        tried.setdefault(one.family, set()).add(one.setting)
    order = list(tried)
    return tuple(
        sorted(
            (_group(lines, len(tried[lines[0].family])) for lines in found.values()),
            key=lambda g: order.index(g.family),
        )
    )


def _group(lines: Sequence[Line], of: int) -> Group:
    first = lines[0]
    margins = [line.margin for line in lines if line.margin is not None]
    settings = tuple(dict.fromkeys(line.setting for line in lines))
    margin = min(margins, default=None)
    return Group(first.family, first.block, first.paths, first.outcome, first.reason, first.spec, margin, settings, of)


def sentence(coverage: Coverage) -> str:
    """The finding in one line: ``27 of 64 families replaced with proof · 384 of 384 models right · 70.1 s``."""
    return f"{_counts(coverage)} · {duration(coverage.seconds)}"


def _counts(coverage: Coverage) -> str:
    folders = {one.family: families()[one.family].folder for one in coverage.tried}
    whole = coverage.replaced()
    replaced = set(folders.values()) - {folder for name, folder in folders.items() if name not in whole}
    right = sum(one.trial.right for one in coverage.tried)
    total = len(set(folders.values()))
    return (
        f"{len(replaced)} of {total} {'family' if total == 1 else 'families'} replaced with proof · "
        f"{right} of {plural(len(coverage.tried), 'model')} right"
    )


def render(coverage: Coverage, console: Console) -> None:
    """Print the table, what went wrong, and the sentence to quote."""
    head = Text(writable(f"packs {', '.join(coverage.packs)}", console), "bold")
    head.append(writable("  " + _versions(coverage), console), "not bold dim")
    console.print(head, overflow="fold", highlight=False)
    shown = groups(coverage)
    family_width = max((cell_len(group.family) for group in shown), default=0)
    block_width = max((cell_len(group.block) for group in shown), default=0)
    for group in shown:
        margin = f"margin {ratio(group.margin)}" if group.margin is not None else ""
        line = Text(writable(f"{SYMBOLS[group.outcome]} ", console), STYLES[group.outcome])
        line.append(group.family.ljust(family_width), "bold")
        line.append(writable(f"  {group.block.ljust(block_width)}  {margin}", console))
        if group.settings != (DEFAULT,):
            line.append(f"  {group.where}", "dim")
        line.rstrip()
        console.print(line, overflow="fold", highlight=False)
        for text in (group.spec, group.reason):
            if text is not None:
                indented(console, text, 4)
    for one in coverage.tried:
        if one.trial.wrong is not None:
            indented(console, f"{one.family} {one.setting}: {one.trial.wrong}", 9, "red", hanging="wrong")
    indented(console, sentence(coverage), 0, "bold" if coverage.exit_code == 0 else "bold red")


def markdown(coverage: Coverage, cuda: OnCuda | None = None, published: Published | None = None) -> str:
    """The table as a page, which has no times, so that two runs can be compared.

    With what ``cuda`` tells of a GPU, and ``published`` of bfloat16 and many experts.
    """
    return "\n".join(_page(coverage, cuda, published)) + "\n"


def _page(coverage: Coverage, cuda: OnCuda | None, published: Published | None) -> Iterator[str]:
    yield "# Coverage"
    yield ""
    yield "Every sparse-MoE family of transformers as a tiny random model in float32: what was read, what became of it,"
    yield "and by how much the proof held. In every setting the whole model's outputs were compared before and after,"
    yield "and after undo. Made by"
    yield ""
    yield f"    {COMMAND}{'' if cuda is None else ON_CUDA}{'' if published is None else AS_PUBLISHED}"
    yield ""
    yield f"with {_versions(coverage)}. {_counts(coverage).replace(' · ', '; ')}."
    if cuda is not None:
        yield cuda.sentence()
    if published is not None:
        yield published.sentence()
    yield ""
    yield "A setting is another config of the family, such as top-1 routing, another activation, groups, or clamps that"
    yield "act; `moe_surgery/testing/families.toml` has them all. The margin is the least of all settings and sites:"
    yield "how many times nearer to the reference the new block is than the nearest wrong block."
    yield "What runs on a GPU, and how fast, is in [gpu.md](gpu.md)."
    yield ""
    more = ([] if cuda is None else ["on CUDA"]) + ([] if published is None else list(FORMS.values()))
    heads = ["family", "block", "computes", "outcome", "settings", "margin", "why not", *more]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for group in groups(coverage):
        margin = ratio(group.margin) if group.margin is not None else ""
        cells = [group.family, group.block, group.spec or "", group.outcome, group.where, margin, group.reason or ""]
        cells += [] if cuda is None else [cuda.of(group.family)]
        cells += [] if published is None else published.of(group.family)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _versions(coverage: Coverage) -> str:
    return " · ".join(f"{name} {version}" for name, version in coverage.versions.items())
