"""Rules and packs: data that says what a model family's blocks must look like. Nothing in them is executed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from moe_surgery.errors import ExpectationError
from moe_surgery.models.site import Site
from moe_surgery.packs.clauses import (
    At,
    Case,
    Child,
    ClassNamed,
    Clause,
    Combines,
    ConfigAt,
    Installed,
    Letters,
    ModelType,
    Reads,
)
from moe_surgery.packs.config_values import ROOT, Absent, Key, View
from moe_surgery.packs.edits import Edit, edits
from moe_surgery.packs.match import Clue, Match, Miss
from moe_surgery.packs.pattern import Pattern
from moe_surgery.packs.toml_text import pairs
from moe_surgery.read.reading import Reading

OUTSIDE = (At, ClassNamed, ConfigAt, ModelType, Installed)


@dataclass(frozen=True)
class Requires:
    """The releases a rule was written for. They are clauses too: a rule of another release matches nothing."""

    releases: tuple[Installed, ...] = ()


@dataclass(frozen=True)
class Expect:
    """How many sites a rule must match: a number, or a key of the checkpoint's config.

    Nothing is expected of a config in which ``unless_false`` is there and false: a part of the model that the config
    switches off is not built.
    """

    count: int | Key
    unless_false: Key | None = None


@dataclass(frozen=True)
class Rule:
    """One kind of block: the clauses that must hold at a site, and what is expected of the model as a whole.

    ``config`` lists where in the checkpoint's config ``@`` keys are looked up; the first that exists wins.
    ``target`` names the target to build, None for the one that the caller chooses. ``origin`` is ``file:line``.
    """

    pack: str
    name: str
    summary: str
    clauses: tuple[Clause, ...]
    config: tuple[str, ...] = ()
    requires: Requires = Requires()
    expect: Expect | None = None
    target: str | None = None
    origin: str = field(default="", compare=False)

    @property
    def full_name(self) -> str:
        """``pack/rule``, the name that reports and plans use."""
        return f"{self.pack}/{self.name}"

    def match(self, site: Site, reading: Reading, config: object) -> Match | Miss:
        """Hold every clause against a site that dataflow has read; all of them, so that all can be explained.

        ``config`` is the checkpoint's config: a mapping, a transformers config object, or None.
        """
        case = Case(site, reading, self.view(config), Letters())
        trail = tuple(clause.check(case) for clause in (*self.clauses, *self.requires.releases))
        if not all(clue.held for clue in trail):
            return Miss(site, trail)
        return Match(site, reading, self.full_name, tuple(sorted(case.letters.sizes.items())), trail)

    def looks_at(self, path: str) -> bool:
        """Whether the rule's globs cover ``path``."""
        return all(
            any(glob.matches(path) for glob in clause.globs) for clause in self.clauses if isinstance(clause, At)
        )

    def edits(self, found: Miss, reading: Reading, config: object) -> tuple[Edit, ...]:
        """What to change in this rule, so that it matches the site that it missed."""
        clauses = (*self.clauses, *self.requires.releases)
        return edits(clauses, found.trail, found.site, reading, self.view(config))

    def glance(self, site: Site, config: object) -> tuple[Clue, ...]:
        """The clauses that can be held against a site which could not be read: all but those on what was read."""
        # None of these looks at the reading.
        case = Case(site, cast("Reading", None), self.view(config), Letters())
        clauses = (*self.clauses, *self.requires.releases)
        return tuple(clause.check(case) for clause in clauses if isinstance(clause, OUTSIDE))

    def view(self, config: object) -> View:
        """``config`` as this rule's ``@`` keys see it."""
        return View.of(config, self.config or (ROOT,))

    def expected(self, config: object) -> int | None:
        """How many sites this rule must match in the model of ``config``; None if it expects nothing there.

        A rule expects nothing of a model whose config has none of the rule's bases, or another ``model_type``.
        Raises :class:`ExpectationError` if the count can't be read.
        """
        view = self.view(config)
        if self.expect is None or (self.config and isinstance(view.node, Absent)):
            return None
        for clause in self.clauses:
            if isinstance(clause, ModelType) and not clause.fits(view):
                return None
        if self.expect.unless_false is not None and view.read(self.expect.unless_false) is False:
            return None
        if isinstance(self.expect.count, int):
            return self.expect.count
        count = view.read(self.expect.count)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            problem = count if isinstance(count, Absent) else f"it is {count!r}, not a count"
            raise ExpectationError(f"{self.origin}: {self.full_name} expects {self.expect.count} sites: {problem}")
        return count

    def to_data(self) -> dict[str, Any]:
        """The rule as the tables of a pack file, in the order of the format's description."""
        data: dict[str, Any] = {"name": self.name, "summary": self.summary}
        find: dict[str, Any] = {}
        read: dict[str, Any] = {}
        if self.config:
            data["config"] = _one_or_list(list(self.config))
        for clause in self.clauses:
            match clause:
                case ModelType(glob):
                    data["model_type"] = str(glob)
                case At(globs):
                    find["path"] = _globs(globs)
                case ClassNamed(globs):
                    find["class"] = _globs(globs)
                case Child(name, shape):
                    find.setdefault("children", {})[name] = str(shape)
                case Combines(_, text):
                    find["combine"] = text
                case Reads(fact, wanted):
                    read[fact] = str(wanted) if isinstance(wanted, Key) else wanted
        if self.target is not None:
            data["target"] = self.target
        data["find"] = find
        if read:
            data["read"] = read
        if self.requires.releases:
            data["requires"] = {release.package: release.specifier for release in self.requires.releases}
        if self.expect is not None:
            count, unless_false = self.expect.count, self.expect.unless_false
            data["expect"] = {"count": str(count) if isinstance(count, Key) else count}
            if unless_false is not None:
                data["expect"]["unless_false"] = str(unless_false)
        return data


@dataclass(frozen=True)
class Pack:
    """The rules of one file. ``last`` packs are tried after all others, whatever order packs are given in."""

    name: str
    version: str
    summary: str
    rules: tuple[Rule, ...]
    last: bool = False
    origin: str = field(default="", compare=False)

    def to_data(self) -> dict[str, Any]:
        """The pack as the tables of its file."""
        head: dict[str, Any] = {"name": self.name, "version": self.version, "summary": self.summary}
        if self.last:
            head["last"] = True
        return {"pack": head, "rule": [rule.to_data() for rule in self.rules]}

    def to_toml(self) -> str:
        """The pack as the text of a pack file: reading it gives an equal pack."""
        data = self.to_data()
        lines = ["[pack]", *pairs(data["pack"])]
        for rule in data["rule"]:
            lines += ["", "[[rule]]", *pairs({k: v for k, v in rule.items() if not isinstance(v, dict)})]
            for name, table in rule.items():
                if isinstance(table, dict):
                    lines += ["", f"[rule.{name}]", *pairs(table)]
        return "\n".join(lines) + "\n"


def _globs(globs: tuple[Pattern, ...]) -> str | list[str]:
    return _one_or_list([str(glob) for glob in globs])


def _one_or_list(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts
