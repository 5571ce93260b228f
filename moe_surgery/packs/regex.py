"""Regular expressions that take time linear in the text, whatever they are: packs come from strangers.

Python's own engine backtracks, and can take for ever. This one follows all ways through the expression at once, so it
has no backreferences and doesn't look around. Only whole texts are matched, so that greedy and lazy are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

MOST_PARTS = 1000
_ATOM = re.compile(r"\\[dDsSwW]|\\[^A-Za-z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?^$]", re.DOTALL)
_COUNT = re.compile(r"\{(\d{1,4})?(,)?(\d{1,4})?\}")


class RegexError(ValueError):
    """An expression that isn't one, that asks for what this engine hasn't, or that is too large."""


class Regex:
    """A compiled expression. Raises :class:`RegexError`, naming the column, when made from text that isn't one.

    It knows characters, ``.``, classes, ``\\d \\s \\w`` and their opposites, escaped punctuation, groups, ``|``,
    ``* + ? {m,n}`` and their lazy forms, and ``^`` and ``$`` for the ends of the text.
    """

    def __init__(self, text: str) -> None:
        self._states: list[_State] = []
        self._parts = 0
        parser = _Parser(text)
        try:
            tree = parser.either()
        except RecursionError:
            raise parser.error("too deeply nested") from None
        if parser.at < len(text):
            raise parser.error('unbalanced ")"')
        self._end = self._new(_State())
        self._start = self._build(tree, self._end)

    def fullmatch(self, text: str) -> bool:
        """Whether the expression matches all of ``text``."""
        now = self._reached([self._start], 0, len(text))
        for at, char in enumerate(text, 1):
            steps = [self._states[state] for state in now]
            now = self._reached([s.after for s in steps if s.reads and s.reads.match(char)], at, len(text))
        return self._end in now

    def _reached(self, states: Iterable[int], at: int, length: int) -> set[int]:
        """``states`` and those beyond them that no character has to be read for."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                state = self._states[number]
                if state.only_at is None or at == (0 if state.only_at == "^" else length):
                    waiting += state.free
        return found

    def _new(self, state: _State) -> int:
        self._states.append(state)
        return len(self._states) - 1

    def _build(self, tree: _Tree, after: int) -> int:
        """The state from which ``tree`` leads to ``after``."""
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise RegexError(f"it has more than {MOST_PARTS} parts, repetitions counted")
        match tree:
            case _Char(reads):
                return self._new(_State(reads, after))
            case _Anchor(sign):
                return self._new(_State(free=[after], only_at=sign))
            case _Sequence(parts):
                for part in reversed(parts):
                    after = self._build(part, after)
                return after
            case _Either(ways):
                return self._new(_State(free=[self._build(way, after) for way in ways]))
            case _Repeat(part, least, most):
                if most is None:
                    loop = self._new(_State(free=[after]))
                    self._states[loop].free.append(self._build(part, loop))
                    after = loop
                else:
                    for _ in range(most - least):
                        after = self._new(_State(free=[after, self._build(part, after)]))
                for _ in range(least):
                    after = self._build(part, after)
                return after


@lru_cache(maxsize=256)
def compiled(text: str) -> Regex:
    """The expression ``text``, compiled once."""
    return Regex(text)


@dataclass
class _State:
    """Reads one character to get to ``after``; or gets to ``free`` states at once, at one end of the text only."""

    reads: re.Pattern[str] | None = None
    after: int = -1
    free: list[int] = field(default_factory=list)
    only_at: str | None = None


@dataclass(frozen=True)
class _Char:
    reads: re.Pattern[str]


@dataclass(frozen=True)
class _Anchor:
    sign: str


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Tree, ...]


@dataclass(frozen=True)
class _Either:
    ways: tuple[_Tree, ...]


@dataclass(frozen=True)
class _Repeat:
    part: _Tree
    least: int
    most: int | None


_Tree = _Char | _Anchor | _Sequence | _Either | _Repeat


class _Parser:
    """Recursive descent over ``either = sequence {"|" sequence}``, ``sequence = {atom [quantifier]}``."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def error(self, problem: str) -> RegexError:
        return RegexError(f"{problem} at column {self.at + 1}")

    def take(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.at):
            return False
        self.at += len(sign)
        return True

    def either(self) -> _Tree:
        ways = [self.sequence()]
        while self.take("|"):
            ways.append(self.sequence())
        return ways[0] if len(ways) == 1 else _Either(tuple(ways))

    def sequence(self) -> _Tree:
        parts: list[_Tree] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.quantified(self.atom()))
        return _Sequence(tuple(parts))

    def quantified(self, part: _Tree) -> _Tree:
        counted = _COUNT.match(self.text, self.at)
        if counted is not None and any(counted.groups()):
            self.at = counted.end()
            least = int(counted[1] or 0)
            most = (int(counted[3]) if counted[3] else None) if counted[2] else least
            if most is not None and most < least:
                raise self.error(f"{counted[0]} ends before it begins")
        elif self.at < len(self.text) and self.text[self.at] in "*+?":
            sign = self.text[self.at]
            self.at += 1
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            return part
        self.take("?")
        if self.at < len(self.text) and self.text[self.at] in "*+?":
            raise self.error("multiple repeat")
        return _Repeat(part, least, most)

    def atom(self) -> _Tree:
        if self.take("("):
            if not self.take("?:") and self.text.startswith("?", self.at):
                raise self.error('no lookaround, names or flags are known here, only "(?:"')
            inner = self.either()
            if not self.take(")"):
                raise self.error('missing ")"')
            return inner
        char = self.text[self.at]
        if char in "^$":
            self.at += 1
            return _Anchor(char)
        found = _ATOM.match(self.text, self.at)
        if found is None:
            raise self.error(f"unexpected {self.text[self.at : self.at + 2]!r}")
        self.at = found.end()
        try:
            return _Char(re.compile(found[0]))
        except re.error as error:
            raise RegexError(f"{found[0]!r}: {error.msg}") from None
