"""Globs over dotted module paths and over names, and regular expressions as the way out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_surgery.errors import UsageError
from moe_surgery.packs.regex import Regex, RegexError, compiled

REGEX = "re:"
LONGEST = 1000
"""Characters of a glob or regular expression."""
_PART = re.compile(r"[^\s.{}()\[\]|\\^$]+")


class PatternError(UsageError):
    """A glob or a regular expression that can't be compiled."""


@dataclass(frozen=True)
class Pattern:
    """A glob that must cover the whole of a text; ``re:`` before it makes it a regular expression.

    With ``dotted`` the text is a module path: ``*`` stands for any characters within one segment, ``?`` for one of
    them, and the segment ``**`` for any number of segments, none included. ``**.mlp`` thus covers ``mlp`` and
    ``layers.0.mlp``, and ``**`` covers the root module, whose path is empty. Without it the text is one segment, such
    as a class name. Raises :class:`PatternError` when made from text that can't be compiled.
    """

    text: str
    dotted: bool = True

    def __post_init__(self) -> None:
        self._compiled()

    def __str__(self) -> str:
        return self.text

    def matches(self, text: str) -> bool:
        """Whether the pattern covers all of ``text``."""
        if self.dotted and text and not self.text.startswith(REGEX):
            text += "."
        return self._compiled().fullmatch(text)

    def _compiled(self) -> Regex:
        if not isinstance(self.text, str):
            raise PatternError(f"a glob is a string, not {self.text!r}")
        if len(self.text) > LONGEST:
            raise PatternError(f"a {self._what()} of {len(self.text)} characters; it has at most {LONGEST}")
        try:
            if self.text.startswith(REGEX):
                return compiled(self.text.removeprefix(REGEX))
            if not self.dotted:
                return compiled(self._part(self.text))
            # Each segment takes its dot along, so that "**" can stand for none of them.
            return compiled("".join(self._segment(segment) for segment in self.text.split(".")))
        except RegexError as error:
            raise PatternError(f'{self._what()} "{self.text}" doesn\'t compile: {error}') from None

    def _what(self) -> str:
        return "regular expression" if self.text.startswith(REGEX) else "glob"

    def _segment(self, segment: str) -> str:
        if segment == "**":
            return r"(?:[^.]+\.)*"
        return ("[^.]+" if segment == "*" else self._part(segment)) + r"\."

    def _part(self, part: str) -> str:
        if not part:
            raise PatternError(f'glob "{self.text}" is empty or has an empty segment')
        if "**" in part:
            raise PatternError(f'glob "{self.text}": ** must be a whole segment, between dots, of a path')
        if not _PART.fullmatch(part):
            bad = next(char for char in part if not _PART.fullmatch(char))
            raise PatternError(f'glob "{self.text}" has {bad!r}, which names never have; start with re: for a regex')
        translate = {"*": "[^.]*", "?": "[^.]"}
        return "".join(translate.get(char) or re.escape(char) for char in part)
