"""Reading pack files: TOML to :class:`~moe_surgery.packs.pack.Pack`, every mistake one error with file and line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from moe_surgery.errors import PackError, UsageError
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
    Shape,
)
from moe_surgery.packs.combine import Formula
from moe_surgery.packs.config_values import Key, check_path
from moe_surgery.packs.facts import FACTS, Plain
from moe_surgery.packs.pack import Expect, Pack, Requires, Rule
from moe_surgery.packs.pattern import Pattern
from moe_surgery.packs.toml_lines import Path as KeyPath
from moe_surgery.packs.toml_lines import key_lines, line_of
from moe_surgery.targets import check_name

PACKAGES = ("torch", "transformers")
_MOST_BYTES = 2**18
_MOST_DOTS = 100
_NAMES = re.compile(r"""[\w"'. \t-]+""")
_LONGEST_ERROR = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_T = TypeVar("_T")


def load_pack(path: Path) -> Pack:
    """Read a pack file. Raises :class:`PackError`, ``file:line: message``, for the first thing wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PackError(f"{path}:1: can't be read: {error.strerror or error}") from None
    return parse_pack(data, str(path))


def parse_pack(data: bytes, file: str) -> Pack:
    """Read a pack file's bytes; ``file`` is what errors and origins call it. Raises :class:`PackError`."""
    # Packs come from strangers, and what parses TOML takes hours for some of what is large, or deep.
    if len(data) > _MOST_BYTES:
        raise PackError(f"{file}:1: {len(data)} bytes; a pack has at most {_MOST_BYTES}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PackError(f"{file}:{line}: not UTF-8: byte {data[error.start]:#04x}") from None
    deep = next((found for found in _NAMES.finditer(text) if found[0].count(".") > _MOST_DOTS), None)
    if deep is not None:
        line = text.count("\n", 0, deep.start()) + 1
        raise PackError(f"{file}:{line}: a name with more than {_MOST_DOTS} dots")
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _syntax_error(file, text, error) from None
    return _pack(_Table(parsed, (), file, key_lines(text), "a pack file"))


def _syntax_error(file: str, text: str, error: Exception) -> PackError:
    message, _, place = str(error).rpartition(" (at ")
    found = re.match(r"line (\d+)", place)
    last = text.rstrip("\n").count("\n") + 1
    line = int(found[1]) if found else last if place.startswith("end") else 1
    return PackError(f"{file}:{line}: not TOML: {message or error}")


@dataclass(frozen=True)
class _Table:
    """A TOML table with its place; hands out its values checked, and complains with file and line."""

    data: dict[str, Any]
    path: KeyPath
    file: str
    lines: dict[KeyPath, int]
    what: str

    def error(self, message: str, *keys: str | int) -> PackError:
        if len(message) > _LONGEST_ERROR:
            message = f"{message[: _LONGEST_ERROR - 100]} … {message[-100:]}"
        return PackError(f"{self.file}:{self.line(*keys)}: {message}")

    def line(self, *keys: str | int) -> int:
        return line_of(self.lines, (*self.path, *keys))

    def known(self, *names: str) -> None:
        """Refuse any other key, the topmost first."""
        unknown = sorted((key for key in self.data if key not in names), key=self.line)
        for key in unknown:
            raise self.error(f'unknown key "{key}" in {self.what}{_nearest(key, names)}', key)
        for key, value in self.data.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise self.error(f"{key} is an integer of more than 64 bits, which TOML hasn't", key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} must be a string, not {_kind(value)}", key)
        return value

    def texts(self, key: str) -> list[str]:
        """A string, or a list of some; an absent key gives none."""
        value = self.data.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.error(f"{key} must be a string or a list of strings, not {_kind(value)}", key)
        if key in self.data and not texts:
            raise self.error(f"{key} must not be an empty list", key)
        return texts

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self.data and default is None:
            raise self.error(f'{self.what} needs the key "{key}"')
        return self.data.get(key, default)

    def table(self, key: str, what: str, default: dict[str, Any] | None = None) -> _Table:
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise self.error(f"{key} must be a table, not {_kind(value)}", key)
        return _Table(value, (*self.path, key), self.file, self.lines, what)

    def parsed(self, key: str, parse: Callable[[str], _T], text: str) -> _T:
        """``parse(text)``, its complaint as an error at ``key``."""
        try:
            return parse(text)
        except (ValueError, UsageError) as error:
            raise self.error(f"{key}: {error}", key) from None


def _pack(top: _Table) -> Pack:
    top.known("pack", "rule")
    head = top.table("pack", "[pack]")
    head.known("name", "version", "summary", "last")
    name = _name(head)
    last = head.get("last", False)
    if not isinstance(last, bool):
        raise head.error(f"last must be true or false, not {_kind(last)}", "last")
    version, summary = head.text("version"), head.text("summary", "")
    tables = top.get("rule")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise top.error(f"rules must be written as [[rule]] tables, not as {_kind(tables)}", "rule")
    rules: dict[str, Rule] = {}
    for number, data in enumerate(tables):
        table = _Table(data, ("rule", number), top.file, top.lines, "[[rule]]")
        rule = _rule(table, name)
        if rule.name in rules:
            first = rules[rule.name].origin
            raise table.error(f'a rule named "{rule.name}" is already at {first}', "name")
        rules[rule.name] = rule
    return Pack(name, version, summary, tuple(rules.values()), last, f"{top.file}:{head.line()}")


def _rule(table: _Table, pack: str) -> Rule:
    table.known("name", "summary", "config", "model_type", "target", "find", "read", "requires", "expect")
    name = _name(table)
    config = tuple(table.parsed("config", check_path, text) for text in table.texts("config"))
    clauses: list[Clause] = []
    find = table.table("find", "[rule.find]")
    find.known("path", "class", "children", "combine")
    find.get("path")
    clauses.append(At(tuple(find.parsed("path", Pattern, text) for text in find.texts("path"))))
    if "class" in find.data:
        clauses.append(ClassNamed(tuple(find.parsed("class", _name_glob, text) for text in find.texts("class"))))
    if config:
        clauses.append(ConfigAt(config))
    if "model_type" in table.data:
        clauses.append(ModelType(table.parsed("model_type", _name_glob, table.text("model_type"))))
    clauses += _children(find)
    clauses += _reads(table.table("read", "[rule.read]", {}))
    return Rule(
        pack=pack,
        name=name,
        summary=table.text("summary", ""),
        clauses=tuple(clauses),
        config=config,
        requires=_requires(table.table("requires", "[rule.requires]", {})),
        expect=_expect(table.table("expect", "[rule.expect]")) if "expect" in table.data else None,
        target=table.parsed("target", _target, table.text("target")) if "target" in table.data else None,
        origin=f"{table.file}:{table.line()}",
    )


def _name(table: _Table) -> str:
    name = table.text("name")
    if not _NAME.fullmatch(name):
        raise table.error(f'name "{name}" must be lower-case letters, digits, ".", "_" and "-"', "name")
    return name


def _target(name: str) -> str:
    check_name(name)
    return name


def _name_glob(text: str) -> Pattern:
    return Pattern(text, dotted=False)


def _children(find: _Table) -> list[Clause]:
    """The clauses on the block's children and on how they combine, in that order: shapes bind letters first."""
    clauses: list[Clause] = []
    names: tuple[str, ...] = ()
    if "children" in find.data:
        children = find.table("children", "children")
        names = tuple(children.data)
        if not names:
            raise children.error("children must name at least one child")
        clauses += [Child(name, children.parsed(name, Shape.parse, children.text(name))) for name in names]
        clauses.append(NoOtherChildren(names))
    if "combine" in find.data:
        text = find.text("combine")
        formula = find.parsed("combine", Formula.parse, text)
        for name in sorted(formula.names - set(names) if names else ()):
            raise find.error(f'combine: "{name}" is not among the children{_nearest(name, names)}', "combine")
        clauses.append(Combines(formula, text))
    return clauses


def _reads(table: _Table) -> list[Clause]:
    table.known(*FACTS)
    return [Reads(name, _wanted(table, name)) for name in FACTS if name in table.data]


def _wanted(table: _Table, name: str) -> Plain | Key:
    value = table.data[name]
    if isinstance(value, str) and value.startswith("@"):
        return table.parsed(name, Key.parse, value)
    problem = FACTS[name].problem(value)
    if problem is not None:
        shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else value
        raise table.error(f'{name} {problem}, or "@key" of the config; it is {shown}', name)
    checked: Plain = value
    return checked


def _requires(table: _Table) -> Requires:
    table.known(*PACKAGES)
    releases = []
    for package in PACKAGES:
        if package in table.data:
            text = table.text(package)
            try:
                SpecifierSet(text)
            except InvalidSpecifier:
                raise table.error(f'{package}: "{text}" is no version specifier such as ">=5.0,<6"', package) from None
            releases.append(Installed(package, text))
    return Requires(tuple(releases))


def _expect(table: _Table) -> Expect:
    table.known("count", "unless_false")
    count = table.get("count")
    if isinstance(count, str):
        count = table.parsed("count", Key.parse, count)
    elif isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise table.error(f'count must be an integer or "@key" of the config, not {_kind(count)}', "count")
    unless = (
        table.parsed("unless_false", Key.parse, table.text("unless_false")) if "unless_false" in table.data else None
    )
    return Expect(count, unless)


def _nearest(word: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean "{near[0]}"?' if near else f" (known: {', '.join(known)})"


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    names = {str: "a string", int: "the integer", float: "the number", list: "a list", dict: "a table"}
    name = names.get(type(value), "a date or time")
    return f"{name} {value}" if type(value) in (int, float) else name
