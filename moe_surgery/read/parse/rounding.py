"""In which dtype a term is computed and kept, and where it is rounded on the way."""

from __future__ import annotations

import torch

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Precision


class Rounding:
    """The dtypes of the terms of a record that was made at dtype ``native``."""

    def __init__(self, native: str, terms: Terms) -> None:
        self._native, self._terms = native, terms
        self._known: dict[int, str | None] = {}

    def bare(self, term: Term) -> Term:
        """The term without changes of precision between the input's dtype and float32."""
        while term.op == "cast":
            if term.args[1] not in (self._native, "float32"):
                raise Unreadable(f"it computes in {term.args[1]} on the way")
            term = term.args[0]
        return term

    def of(self, term: Term) -> Precision:
        """What the term is kept in."""
        return "native" if self._dtype(term) in (self._native, None) else "float32"

    def lost(self, term: Term) -> bool:
        """Whether float32 numbers are rounded to the input's dtype by the changes of precision that ``bare`` drops."""
        found = False
        while term.op == "cast":
            found = found or (term.args[1] == self._native and self._coarser(term.args[0]))
            term = term.args[0]
        return found

    def _coarser(self, term: Term) -> bool:
        kept = self._dtype(term)
        return kept is not None and _eps(self._native) > _eps(kept)

    def _dtype(self, term: Term) -> str | None:
        """As torch promotes dtypes; known numbers, which have None, take that of what they meet."""
        if term.uid not in self._known:
            self._known[term.uid] = self._found(term)
        return self._known[term.uid]

    def _found(self, term: Term) -> str | None:
        if term.op == "const":
            return None
        if term.op in ("cast", "lin"):
            return str(term.args[-1])
        inner = self._terms.inner(term)
        if term.op == "chosen":
            inner = inner[:1]
        if not inner:
            return self._native
        kept = [dtype for dtype in map(self._dtype, inner) if dtype is not None]
        return min(kept, key=_eps, default=None)


def _eps(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)
