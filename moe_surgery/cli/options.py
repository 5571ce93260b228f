"""The flags that several commands share, in groups. A command takes a group as one parameter (see ``command.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer


class Format(StrEnum):
    """How a result is written."""

    text = "text"
    json = "json"


class Color(StrEnum):
    """When a result is coloured."""

    auto = "auto"
    always = "always"
    never = "never"


class DType(StrEnum):
    """The dtype a model is loaded in; ``auto`` is the plan's, else the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Prove(StrEnum):
    """How many blocks of an engine's model are proven."""

    sample = "sample"
    all = "all"


class OnFailure(StrEnum):
    """What becomes of a program whose model can't be operated on."""

    stop = "stop"
    keep = "keep"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local model directory, or a hub id.", show_default=False)
]
ModelOrPlan = Annotated[
    str, typer.Argument(metavar="MODEL|PLAN.JSON", help="A model, or a plan that was saved.", show_default=False)
]
Packs = Annotated[
    list[str] | None,
    typer.Option("--pack", metavar="P", help="A pack's name or .toml file; repeatable.", show_default="all installed"),
]
Svg = Annotated[
    Path | None, typer.Option("--svg", metavar="FILE", help="Also write the report as a picture.", show_default=False)
]

Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as a web page.", show_default=False)
]
Words = Annotated[
    list[str], typer.Argument(metavar="-- COMMAND…", help="What to start, with its arguments.", show_default=False)
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Where receipts go.", show_default="a temporary folder")
]
Save = Annotated[
    Path | None,
    typer.Option("--save", "-o", metavar="PLAN.JSON", help="Save the plan for apply.", show_default=False),
]
Generate = Annotated[
    str | None,
    typer.Option(
        "--generate", metavar="IDS", help='Token ids, such as "1,2,3": compare greedy tokens.', show_default=False
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="The same from text, if the model comes with a tokenizer.",
        show_default=False,
    ),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", metavar="N", min=1, max=1 << 20, help="How many to generate.")]
BenchTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        metavar="N",
        min=1,
        max=1 << 20,
        help="Tokens per call of a block, and per prefill if above 1; repeatable.",
        show_default="1, 8, 64, 512",
    ),
]
Batch = Annotated[
    list[int] | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        max=1 << 16,
        help="Sequences of a decoding step; repeatable.",
        show_default="1, 8",
    ),
]
TuneTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens", metavar="N", min=1, help="Tune for N tokens; repeatable.", show_default="powers of two to 8192"
    ),
]


@dataclass(frozen=True)
class Output:
    """Where results and progress go."""

    panel: ClassVar[str] = "Output"

    format: Annotated[Format, typer.Option("--format", help="Form of the result.")] = Format.text
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the result there, not to stdout.", show_default=False),
    ] = None
    color: Annotated[Color, typer.Option("--color", help="When to colour; auto honours NO_COLOR.")] = Color.auto
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress on stderr.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and only the last line on stdout.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what libraries print, and tracebacks.")] = False


@dataclass(frozen=True)
class Choice:
    """Which sites are meant, by which rules, and how sure the user is of their number."""

    panel: ClassVar[str] = "Which sites"

    pack: Packs = None
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="GLOB",
            help='Only sites whose path matches, such as "talker.**"; repeatable.',
            show_default=False,
        ),
    ] = None
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="GLOB",
            help='Leave out sites whose path matches, such as "**.0.mlp"; repeatable.',
            show_default=False,
        ),
    ] = None
    expect: Annotated[
        int | None,
        typer.Option(
            "--expect", metavar="N", min=0, help="Fail unless N sites are to be replaced.", show_default=False
        ),
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a site is missed or refused.")] = False
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="What to build: auto, folded, vllm, reference.")
    ] = "auto"

    def given(self) -> list[str]:
        """The names of the flags that differ from their defaults, as the user wrote them."""
        plain = Choice()
        names = ("pack", "only", "skip", "expect", "strict", "target")
        return [f"--{name}" for name in names if getattr(self, name) not in (getattr(plain, name), [])]

    def as_plan(self) -> dict[str, Any]:
        """The keyword arguments that ``plan``, ``apply`` and ``verify`` share."""
        return {
            "packs": tuple(self.pack) if self.pack else None,
            "only": tuple(self.only or ()),
            "skip": tuple(self.skip or ()),
            "expect": self.expect,
            "strict": self.strict,
            "target": self.target,
        }


@dataclass(frozen=True)
class Trust:
    """Whether code that comes with a model may run."""

    panel: ClassVar[str] = "Loading"

    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False


@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    panel: ClassVar[str] = "Loading"

    dtype: Annotated[DType, typer.Option("--dtype", help="Load the weights in this dtype.")] = DType.auto
    device: Annotated[str, typer.Option("--device", metavar="D", help="Such as cpu, cuda, cuda:1.")] = "cpu"


@dataclass(frozen=True)
class Place:
    """What a plan is made for."""

    panel: ClassVar[str] = "Planned for"

    dtype: Annotated[DType, typer.Option("--dtype", help="Plan for weights in this dtype.")] = DType.auto
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="D", help="Such as cpu or cuda; it needn't be on this machine.", show_default="cpu"
        ),
    ] = None

    def as_plan(self) -> dict[str, Any]:
        """The keyword arguments of ``plan``."""
        return {"device": self.device, "dtype": None if self.dtype is DType.auto else self.dtype.value}


@dataclass(frozen=True)
class Proof:
    """How the proof is done."""

    panel: ClassVar[str] = "Proof"

    margin: Annotated[
        float,
        typer.Option(
            "--margin",
            metavar="X",
            min=1.0,
            help="How many times nearer to the reference than any mutant a block must be.",
        ),
    ] = 5.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed for the tokens that blocks are tried on.")] = 0
