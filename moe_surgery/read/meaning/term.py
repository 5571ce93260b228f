"""A term: what one row of one tensor is, as a formula over the block's input and weights.

It stands for a vector of ``size`` elements belonging to one token; one of size 1 also stands for a vector of any length
whose elements are all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WHOLE = frozenset(
    ["x", "given", "outer", "param", "lin", "softmax", "sum", "norm", "largest", "chosen", "part", "elem", "vec", "cat"]
)
"""Operations whose elements don't come each from the same element of their arguments."""


@dataclass(frozen=True, eq=False, repr=False)
class Term:
    """One formula. ``op`` names it, ``args`` are terms or plain values, ``size`` is the vector's length."""

    op: str
    args: tuple[Any, ...]
    size: int
    uid: int

    def __repr__(self) -> str:
        if self.op == "x":
            return "x"
        if self.op == "const":
            return f"{self.args[0]:g}"
        if self.op == "param":
            return str(self.args[0])
        if self.op == "lin":
            return f"{self.args[1]}·{self.args[0]!r}"
        if self.op == "cast":
            return repr(self.args[0])
        if self.op == "chosen" and self.args[0] is self.args[1]:
            return f"chosen({self.args[0]!r})"
        if self.op in ("add", "mul", "div"):
            sign = {"add": " + ", "mul": " * ", "div": " / "}[self.op]
            return "(" + sign.join(map(repr, self.args)) + ")"
        return f"{self.op}({', '.join(map(repr, self.args))})"
