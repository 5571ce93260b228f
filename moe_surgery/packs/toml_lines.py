"""On which line of a TOML text each key stands; the standard library's parser doesn't say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

Path = tuple[str | int, ...]
"""Keys and, for elements of arrays of tables, indices from 0."""

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of every key and table header of ``text``, which must be valid TOML.

    A table's line is its header's, or that of the first key which implies it. Keys inside inline tables and arrays
    are not listed: :func:`line_of` gives them the line of the key that holds them.
    """
    return _Scanner(text.replace("\r\n", "\n")).scan()


def line_of(lines: Mapping[Path, int], path: Path) -> int:
    """The line of ``path``, or of the nearest thing around it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


class _Scanner:
    """Walks a text from statement to statement: a header, or a key and its value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.counts: dict[Path, int] = {}  # length so far of each array of tables

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self.skip_blank()
        while self.at < len(self.text):
            if self.text.startswith("[", self.at):
                table = self.header()
            else:
                line = self.line()
                self.record(table, self.key(), line)
                self.at += 1  # the "="
                self.skip_value()
            self.skip_blank()
        return self.lines

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def skip_blank(self) -> None:
        found = _BLANK.match(self.text, self.at)
        assert found is not None  # the expression matches nothing, too
        self.at = found.end()

    def record(self, table: Path, names: list[str], line: int) -> None:
        for end in range(1, len(names) + 1):
            self.lines.setdefault((*table, *names[:end]), line)

    def header(self) -> Path:
        """Step over ``[a.b]`` or ``[[a.b]]``; the path of the table that it opens."""
        line = self.line()
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        names = self.key()
        self.at += 2 if array else 1
        path: Path = ()
        for number, name in enumerate(names):
            path += (name,)
            if array and number == len(names) - 1:
                self.counts[path] = self.counts.get(path, 0) + 1
            self.lines.setdefault(path, line)
            if path in self.counts:  # names the array's newest table
                path += (self.counts[path] - 1,)
        self.lines.setdefault(path, line)
        return path

    def key(self) -> list[str]:
        """Step over a dotted key and the space behind it, up to "=" or "]"."""
        names = []
        while True:
            self.skip_space()
            start = self.at
            if self.text[start] in "\"'":
                self.skip_string()
                names.append(next(iter(tomllib.loads(f"{self.text[start : self.at]} = 0"))))
            else:
                found = _BARE.match(self.text, start)
                assert found is not None  # valid TOML has a key here
                self.at = found.end()
                names.append(found[0])
            self.skip_space()
            if not self.text.startswith(".", self.at):
                return names
            self.at += 1

    def skip_space(self) -> None:
        while self.text[self.at] in " \t":
            self.at += 1

    def skip_value(self) -> None:
        """Step to the end of the value's last line, or to the comment behind it."""
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in "\"'":
                self.skip_string()
                continue
            if char == "#" and depth:
                self.skip_blank()
                continue
            if char in "#\n" and not depth:
                return
            depth += (char in "[{") - (char in "]}")
            self.at += 1

    def skip_string(self) -> None:
        quote = self.text[self.at]
        if self.text.startswith(quote * 3, self.at):
            self.at += 3
            self.skip_to(quote * 3, escapes=quote == '"')
            # Up to two quotes may stand directly before the closing three.
            extra = re.compile(f"{quote}{{0,2}}").match(self.text, self.at)
            self.at = extra.end() if extra else self.at
        else:
            self.at += 1
            self.skip_to(quote, escapes=quote == '"')

    def skip_to(self, end: str, *, escapes: bool) -> None:
        if not escapes:
            self.at = self.text.index(end, self.at)
        while not self.text.startswith(end, self.at):
            self.at += 2 if self.text[self.at] == "\\" else 1
        self.at += len(end)
