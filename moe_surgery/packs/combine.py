"""How a block combines its children, as one readable line: ``experts + sigmoid(shared_gate) * shared``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from moe_surgery.errors import UsageError

FUNCTIONS = ("sigmoid",)
_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*(?:\.\w+)*)|(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d\d?)?)|(?P<sign>[+*()]))"
)
LONGEST = 1000
"""Characters of a formula."""
_MOST_TERMS = 64

# A sum of products: each product is its factors in sorted order, with a coefficient.
_Terms = dict[tuple[str, ...], Fraction]


class FormulaError(UsageError):
    """A formula that can't be parsed."""


@dataclass(frozen=True)
class Formula:
    """A sum of products of children, functions of them, and numbers.

    Two formulas are equal if they are the same sum of products, whatever the order and the brackets:
    ``canonical`` is multiplied out and sorted. Numbers are exact, so ``2.5 * 2`` equals ``5``.
    """

    canonical: str
    names: frozenset[str] = field(compare=False)

    def __str__(self) -> str:
        return self.canonical

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Read a formula. Raises :class:`FormulaError` naming the column."""
        if len(text) > LONGEST:
            raise FormulaError(f"a formula of {len(text)} characters; it has at most {LONGEST}")
        parser = _Parser(text)
        try:
            terms = parser.sum()
        except RecursionError:
            raise parser.error("too deeply nested") from None
        if parser.kind != "end":
            raise parser.error(f'unexpected "{parser.token}"')
        return cls(_show(terms), frozenset(parser.names))


class _Parser:
    """Recursive descent over ``sum = product {"+" product}``, ``product = factor {"*" factor}``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 0
        self.names: set[str] = set()
        self.advance()

    def advance(self) -> None:
        found = _TOKEN.match(self.text, self.end)
        if found is not None:
            self.kind, self.token = str(found.lastgroup), str(found[str(found.lastgroup)])
            self.start, self.end = found.start(str(found.lastgroup)), found.end()
            return
        rest = self.text[self.end :]
        self.start = len(self.text) - len(rest.lstrip())
        if rest.strip():
            raise self.error(f'unexpected "{self.text[self.start]}"')
        self.kind, self.token = "end", ""

    def error(self, problem: str) -> FormulaError:
        return FormulaError(f'formula "{self.text}", column {self.start + 1}: {problem}')

    def take(self, sign: str) -> bool:
        """Step over ``sign`` if it is next."""
        if self.kind != "sign" or self.token != sign:
            return False
        self.advance()
        return True

    def sum(self) -> _Terms:
        total = self.product()
        while self.take("+"):
            for factors, number in self.product().items():
                total[factors] = total.get(factors, Fraction(0)) + number
        return {factors: number for factors, number in total.items() if number}

    def product(self) -> _Terms:
        total = self.factor()
        while self.take("*"):
            right, left, total = self.factor(), total, {}
            for a, x in left.items():
                for b, y in right.items():
                    factors = tuple(sorted(a + b))
                    total[factors] = total.get(factors, Fraction(0)) + x * y
            if len(total) > _MOST_TERMS:
                raise self.error(f"more than {_MOST_TERMS} terms when multiplied out")
        return total

    def factor(self) -> _Terms:
        if self.take("("):
            return self.closed()
        kind, token = self.kind, self.token
        if kind == "number":
            self.advance()
            return {(): Fraction(token)}
        if kind != "name":
            raise self.error("a child's name, a number or a bracket must come here")
        start = self.start
        self.advance()
        if self.take("("):
            if token not in FUNCTIONS:
                self.start = start
                raise self.error(f'unknown function "{token}" (known: {", ".join(FUNCTIONS)})')
            return {(f"{token}({_show(self.closed())})",): Fraction(1)}
        self.names.add(token)
        return {(token,): Fraction(1)}

    def closed(self) -> _Terms:
        terms = self.sum()
        if not self.take(")"):
            raise self.error('")" is missing')
        return terms


def _show(terms: _Terms) -> str:
    products = []
    for factors, number in sorted(terms.items()):
        shown = [] if number == 1 and factors else [_decimal(number)]
        products.append(" * ".join(shown + list(factors)))
    return " + ".join(products) or "0"


def _decimal(number: Fraction) -> str:
    """All digits of ``number``, which as a sum of products of decimals has an end."""
    places = 0
    while number.denominator != 1:
        number, places = number * 10, places + 1
    digits = str(number.numerator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits
