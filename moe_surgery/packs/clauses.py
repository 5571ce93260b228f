"""The vocabulary of rules. A clause is held against what was read at a site, and answers with a :class:`Clue`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Literal, Protocol

from packaging.specifiers import SpecifierSet

from moe_surgery.models.site import Site
from moe_surgery.packs.combine import Formula, FormulaError
from moe_surgery.packs.config_values import Absent, Key, View
from moe_surgery.packs.facts import ACTIVATIONS, FACTS, Plain
from moe_surgery.packs.match import Clue
from moe_surgery.packs.pattern import Pattern
from moe_surgery.read.reading import ChildShape, Reading

LETTERS = {"E": "experts", "I": "expert width", "S": "shared width", "H": "hidden"}

_MODEL_TYPE = Key(("model_type",))


@dataclass
class Letters:
    """The sizes that shape letters stand for at one site, and which clause said so first."""

    sizes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def bind(self, letter: str, size: int, source: str) -> str | None:
        """Take ``size`` for ``letter``; the contradiction in words if it already stands for another."""
        known = self.sizes.setdefault(letter, size)
        first = self.sources.setdefault(letter, source)
        return None if known == size else f"{letter} is {known} in {first} and {size} in {source}"


@dataclass(frozen=True, eq=False)
class Case:
    """One site as one rule sees it. ``letters`` fills as the clauses are checked, in the rule's order."""

    site: Site
    reading: Reading
    view: View
    letters: Letters


class Clause(Protocol):
    """One condition of a rule."""

    def check(self, case: Case) -> Clue:
        """Hold the clause against a site; never raises for what the site is."""
        ...


@dataclass(frozen=True)
class At:
    """The site's path is covered by one of ``globs``."""

    globs: tuple[Pattern, ...]

    def check(self, case: Case) -> Clue:
        held = any(glob.matches(case.site.path) for glob in self.globs)
        return Clue("path", held, " or ".join(map(str, self.globs)), case.site.path or "the root module")


@dataclass(frozen=True)
class ClassNamed:
    """The block's class name is covered by one of ``globs``. Narrows a rule; nothing is matched by it alone."""

    globs: tuple[Pattern, ...]

    def check(self, case: Case) -> Clue:
        held = any(glob.matches(case.site.kind) for glob in self.globs)
        return Clue("class", held, " or ".join(map(str, self.globs)), case.site.kind)


@dataclass(frozen=True)
class ConfigAt:
    """The checkpoint's config has one of ``bases``, from where ``@`` keys are read."""

    bases: tuple[str, ...]

    def check(self, case: Case) -> Clue:
        held = not isinstance(case.view.node, Absent)
        return Clue("config", held, " or ".join(self.bases), case.view.base or str(case.view.node))


@dataclass(frozen=True)
class ModelType:
    """The config's ``model_type``, read at the rule's base, is covered by ``glob``."""

    glob: Pattern

    def fits(self, view: View) -> bool:
        """Whether the config that ``view`` looks at is of this type."""
        found = view.read(_MODEL_TYPE)
        return isinstance(found, str) and self.glob.matches(found)

    def check(self, case: Case) -> Clue:
        return Clue("model_type", self.fits(case.view), str(self.glob), str(case.view.read(_MODEL_TYPE)))


@dataclass(frozen=True)
class Shape:
    """A child's form and sizes, as a pack writes it: ``E H``, ``E I H``, ``mlp S H``, ``1 H``."""

    form: Literal["matrix", "experts", "mlp"]
    dims: tuple[str | int, ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read a shape. Raises :class:`ValueError` saying what is wrong with it."""
        words = text.split()
        mlp = words[:1] == ["mlp"]
        sizes = words[1:] if mlp else words
        for word in sizes:
            if word not in LETTERS and not (word.isdecimal() and word.isascii() and int(word) > 0):
                known = ", ".join(f"{letter} {what}" for letter, what in LETTERS.items())
                raise ValueError(f'unknown shape letter "{word}" (known: {known}, or a number above 0)')
        dims = tuple(int(word) if word.isdecimal() else word for word in sizes)
        if mlp and len(dims) == 2:
            return cls("mlp", dims)
        if not mlp and len(dims) in (2, 3):
            return cls("matrix" if len(dims) == 2 else "experts", dims)
        raise ValueError(f'"{text}" is no shape: write "E H" (a matrix), "E I H" (experts) or "mlp S H" (a gated MLP)')

    def __str__(self) -> str:
        return ("mlp " if self.form == "mlp" else "") + " ".join(map(str, self.dims))

    def mismatch(self, found: ChildShape, letters: Letters, source: str) -> str | None:
        """Why ``found`` is not this shape, or None; binds the letters of a shape of the right form."""
        if found.form != self.form or len(found.dims) != len(self.dims):
            return f"{found} ({found.form})"
        clashes = []
        for dim, size in zip(self.dims, found.dims, strict=True):
            if isinstance(dim, str):
                clash = letters.bind(dim, size, source)
            else:
                clash = None if dim == size else f"{size} where {dim} is wanted"
            if clash is not None:
                clashes.append(clash)
        return f"{found}: {', '.join(clashes)}" if clashes else None


@dataclass(frozen=True)
class Child:
    """The block has a child of this name, form and size."""

    name: str
    shape: Shape

    def check(self, case: Case) -> Clue:
        clause = f"children.{self.name}"
        found = dict(case.reading.children).get(self.name)
        if found is None:
            names = ", ".join(name for name, _ in case.reading.children) or "none"
            return Clue(clause, False, str(self.shape), f"no such child (there are: {names})")
        problem = self.shape.mismatch(found, case.letters, self.name)
        return Clue(clause, problem is None, str(self.shape), problem or str(found))


@dataclass(frozen=True)
class NoOtherChildren:
    """The block has no child with weights besides ``names``."""

    names: tuple[str, ...]

    def check(self, case: Case) -> Clue:
        others = [f"{name} ({shape})" for name, shape in case.reading.children if name not in self.names]
        return Clue("children", not others, "no others", "also " + ", ".join(others) if others else "no others")


@dataclass(frozen=True)
class Combines:
    """The block's output is this sum of products of its children. ``text`` is the formula as the pack writes it."""

    formula: Formula
    text: str = field(compare=False)

    def check(self, case: Case) -> Clue:
        try:
            held = Formula.parse(case.reading.combine) == self.formula
        except FormulaError:  # a reading beyond the vocabulary is one no rule can ask for
            held = False
        return Clue("combine", held, self.text, case.reading.combine)


@dataclass(frozen=True)
class Reads:
    """What dataflow read of ``fact`` is the wanted value: a literal, or what the checkpoint's config says."""

    fact: str
    wanted: Plain | Key

    def check(self, case: Case) -> Clue:
        fact, clause = FACTS[self.fact], f"read.{self.fact}"
        found = fact.get(case.reading.spec)
        absent = "no shared expert" if self.fact.startswith("shared_") and case.reading.spec.shared is None else "none"
        shown = absent if found is None else _show(found)
        if isinstance(self.wanted, Key):
            value = case.view.read(self.wanted)
            if isinstance(value, Absent):
                return Clue(clause, False, str(self.wanted), f"{shown}; {value}")
            if isinstance(value, str):
                value = ACTIVATIONS.get(value, value)
            wanted = f"{_show(value)} ({self.wanted})"
            problem = fact.problem(value)
            if problem is not None:
                return Clue(clause, False, wanted, f"{shown}; the config's value {problem}")
        else:
            value, wanted = self.wanted, _show(self.wanted)
        clash = None
        if fact.letter is not None and isinstance(found, int):
            clash = case.letters.bind(fact.letter, found, clause)
        return Clue(clause, found == value and clash is None, wanted, f"{shown}: {clash}" if clash else shown)


@dataclass(frozen=True)
class Installed:
    """The installed release of ``package`` is one of ``specifier``'s; pre-releases count by their number."""

    package: str
    specifier: str

    def check(self, case: Case) -> Clue:
        try:
            version = _version(self.package)
        except metadata.PackageNotFoundError:
            return Clue(f"requires.{self.package}", False, self.specifier, "not installed")
        held = SpecifierSet(self.specifier).contains(version, prereleases=True)
        return Clue(f"requires.{self.package}", held, self.specifier, version)


@cache
def _version(package: str) -> str:
    """Reading a package's metadata takes milliseconds, and rules ask at every site."""
    return metadata.version(package)


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
