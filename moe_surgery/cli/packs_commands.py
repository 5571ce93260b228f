"""The commands about rule packs and their flags. What a command does is in ``packs_doctor`` and ``packs_trial``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_surgery.cli import packs_doctor, packs_trial
from moe_surgery.cli.command import Group, command
from moe_surgery.cli.guard import run
from moe_surgery.cli.options import Output

packs = typer.Typer(cls=Group, help="The rule packs that are installed.", no_args_is_help=True)

Pack = Annotated[str, typer.Argument(metavar="PACK", help="A pack's name, or a .toml file.", show_default=False)]


@command(packs, "packs list")
def packs_list(output: Output) -> None:
    """List the installed packs and their rules."""
    run(output, packs_doctor.packs_list)


@command(packs, "packs show")
def packs_show(pack: Pack, output: Output) -> None:
    """Print a pack as it was understood, in its file's own format."""
    run(output, lambda screen: packs_doctor.packs_show(screen, pack))


@command(packs, "packs check")
def packs_check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Pack files, or folders of them.", show_default=False)
    ],
    output: Output,
) -> None:
    """Check that packs can be read; the error names file and line."""
    run(output, lambda screen: packs_doctor.packs_check(screen, files))


@command(packs, "packs test")
def packs_test(
    output: Output,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PACK]…", help="Packs' names or .toml files.", show_default="all installed"),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", metavar="F", help="Only this family; repeatable.", show_default="all"),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting", metavar="S", help='A setting such as "top1", or "all"; repeatable.', show_default="default"
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 11 if a block is missed or refused.")] = False,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Write the table to FILE too.", show_default=False),
    ] = None,
    cuda: Annotated[
        Path | None,
        typer.Option(
            "--cuda",
            metavar="FILE",
            help="Add to --markdown what benchmarks/families.py saw on a GPU.",
            show_default=False,
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            "--published",
            metavar="FILE",
            help="Add to --markdown what benchmarks/published.py saw in bfloat16 and with many experts.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Try packs on a tiny model of every family: operate, prove, compare, undo, and print the coverage table."""
    run(
        output,
        lambda screen: packs_trial.packs_test(
            screen, names, family, setting, strict=strict, markdown=markdown, cuda=cuda, published=published
        ),
    )
