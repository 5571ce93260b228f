"""The smallest change of a rule that makes it match a site: for each clause that fails, what it should have said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_surgery.models.site import Site
from moe_surgery.packs.clauses import (
    At,
    Child,
    ClassNamed,
    Clause,
    Combines,
    ConfigAt,
    Installed,
    ModelType,
    NoOtherChildren,
    Reads,
)
from moe_surgery.packs.combine import Formula, FormulaError
from moe_surgery.packs.config_values import ROOT, Absent, Key, View
from moe_surgery.packs.facts import ACTIVATIONS, FACTS
from moe_surgery.packs.match import Clue
from moe_surgery.packs.toml_text import literal
from moe_surgery.read.reading import ChildShape, Reading
from moe_surgery.spec import MoESpec


@dataclass(frozen=True)
class Edit:
    """One line of a rule: ``key`` is to hold ``value``, or to go if that is None. ``install`` names a release instead.

    ``instead`` says which value of the checkpoint's config would do as well, where the rule reads it from there.
    """

    key: str
    value: Any = None
    install: str | None = None
    instead: str | None = None

    def __str__(self) -> str:
        if self.install is not None:
            return f"install {self.install}"
        line = f"{self.key} = {literal(self.value)}" if self.value is not None else f"remove {self.key}"
        return f"{line}  # or {self.instead}" if self.instead else line


def edits(
    clauses: Sequence[Clause], trail: Sequence[Clue], site: Site, reading: Reading, view: View
) -> tuple[Edit, ...]:
    """What to change in a rule, whose ``clauses`` gave ``trail`` at ``site``, so that all of them hold there.

    ``view`` is the config as the rule sees it. Nothing is weakened further than the site needs: a path gains a glob
    beside those it has, a size takes its letter.
    """
    failed = [clause for clause, clue in zip(clauses, trail, strict=True) if not clue.held]
    if any(isinstance(clause, ConfigAt) for clause in failed):
        view = View.of(view.root)
    found: dict[str, Edit] = {}
    for clause in failed:
        for edit in _edits(clause, clauses, site, reading, view):
            found.setdefault(edit.key, edit)
    return tuple(found.values())


def _edits(clause: Clause, clauses: Sequence[Clause], site: Site, reading: Reading, view: View) -> Iterator[Edit]:
    match clause:
        case At(globs):
            yield Edit("find.path", _more([str(glob) for glob in globs], _without_numbers(site.path)))
        case ClassNamed(globs):
            yield Edit("find.class", _more([str(glob) for glob in globs], site.kind))
        case ConfigAt(bases):
            yield Edit("config", [*bases, ROOT] if view.root is not None else None)
        case ModelType():
            found = view.read(Key(("model_type",)))
            if not clause.fits(view):
                yield Edit("model_type", found if isinstance(found, str) and found else None)
        case Child() | NoOtherChildren():
            yield _children(reading)
        case Combines():
            yield Edit("find.combine", reading.combine if _says(reading.combine) else None)
        case Reads():
            yield from _read(clause, clauses, reading, view)
        case Installed(package, specifier):
            yield Edit(f"requires.{package}", install=f"{package}{specifier}")


def _read(clause: Reads, clauses: Sequence[Clause], reading: Reading, view: View) -> Iterator[Edit]:
    fact, wanted = FACTS[clause.fact], clause.wanted
    found = fact.get(reading.spec)
    if isinstance(wanted, Key):
        stated = view.read(wanted)
        wanted = ACTIVATIONS.get(stated, stated) if isinstance(stated, str) else stated  # type: ignore[assignment]
    if fact.letter is not None and _taken(fact.letter, found, clauses, reading):
        yield _children(reading)
    if found is not None and type(found) is type(wanted) and found == wanted and fact.problem(wanted) is None:
        return
    usable = found is not None and fact.problem(found) is None
    instead = None
    if usable and isinstance(clause.wanted, Key) and not isinstance(view.read(clause.wanted), Absent):
        instead = f"{str(clause.wanted).removeprefix('@').removeprefix('/')}: {literal(found)} in the config"
    yield Edit(f"read.{clause.fact}", found if usable else None, instead=instead)


def _taken(letter: str, size: object, clauses: Sequence[Clause], reading: Reading) -> bool:
    """Whether a child's shape takes ``letter`` for another size, which would contradict what was read."""
    children = dict(reading.children)
    shapes = [
        (clause.shape.dims, children[clause.name].dims)
        for clause in clauses
        if isinstance(clause, Child) and clause.name in children
    ]
    return any(
        dim == letter and found != size for dims, sizes in shapes for dim, found in zip(dims, sizes, strict=False)
    )


def _children(reading: Reading) -> Edit:
    shapes = {name: _shape(shape, reading.spec) for name, shape in reading.children}
    return Edit("find.children", shapes or None)


def _shape(found: ChildShape, spec: MoESpec) -> str:
    """A child's shape as a pack writes it: letters for the sizes that have one at their place."""
    width, shared = spec.experts.width, spec.shared.width if spec.shared else None
    letters: dict[str, tuple[tuple[str, int | None], ...]] = {
        "matrix": (("E", spec.router.num_experts), ("H", spec.hidden)),
        "experts": (("E", spec.experts.num_experts), ("I", width), ("H", spec.hidden)),
        "mlp": (("S", shared), ("H", spec.hidden)),
    }
    known = letters[found.form]
    words = [letter if size == dim else str(dim) for dim, (letter, size) in zip(found.dims, known, strict=True)]
    return " ".join(["mlp", *words] if found.form == "mlp" else words)


def _says(formula: str) -> bool:
    try:
        Formula.parse(formula)
    except FormulaError:
        return False
    return True


def _without_numbers(path: str) -> str:
    """A path as a glob over all layers: ``layers.3.mlp`` becomes ``layers.*.mlp``."""
    return ".".join("*" if part.isdecimal() else part for part in path.split(".")) if path else "**"


def _more(known: list[str], new: str) -> str | list[str]:
    return [*known, new]
