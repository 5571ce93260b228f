"""Scores that were chosen, named by their rank and not their expert: masked ones, and the highest of what is ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.top_k import Ranking

_SCORES = ("softmax", "sigmoid", "sqrt")
_EACH = ("div", "mul", "add", "clamp", "cast")


class ByChoice:
    """Renames the scores of one token that ``rankings`` chose. ``bare`` takes the rounding off a term."""

    def __init__(self, rankings: Sequence[Ranking], terms: Terms, bare: Callable[[Term], Term]) -> None:
        self._rankings, self._terms, self._bare = rankings, terms, bare
        self._known: dict[int, Term] = {}

    def __call__(self, term: Term) -> Term:
        """A scalar in which every score that was chosen is an element of what was chosen."""
        if term.uid not in self._known:
            self._known[term.uid] = self._renamed(term)
        return self._known[term.uid]

    def _renamed(self, term: Term) -> Term:
        terms = self._terms
        if term.op == "elem" and term.args[0].op in _EACH and self._of_tokens(term.args[0]):
            return self(terms.of_elements(term))
        if term.op == "elem" and term.args[0].op in (*_SCORES, *_EACH):
            for ranking in self._rankings:
                if term.args[0].size == ranking.scores.size > len(ranking.ids) and term.args[1] in ranking.ids:
                    if term.args[0].op in _EACH:
                        return self(terms.of_elements(term))
                    return terms.elem(self._chosen(term.args[0], ranking), ranking.ids.index(term.args[1]))
        if term.op == "chosen" and term.size == 1:
            values, ranked, number = term.args
            for ranking in self._rankings:
                if number in ranking.parts:
                    values = ranking.scores if values is ranked else values
                    return terms.elem(self._chosen(values, ranking), ranking.parts.index(number))
        if term.op == "largest":
            for ranking in self._rankings:
                if self._bare(term.args[0]) is self._bare(ranking.scores):
                    return terms.elem(self._chosen(term.args[0], ranking), 0)
        if term.size != 1:
            return term
        if term.op == "cast":
            return terms.cast(self(term.args[0]), term.args[1])
        if term.op == "div":
            return terms.div(*map(self, term.args))
        if term.op in ("add", "mul"):
            args = map(self, term.args)
            return terms.add(*args) if term.op == "add" else terms.mul(*args)
        if term.op == "clamp":
            return terms.clamp(self(term.args[0]), *term.args[1:])
        return term

    def _of_tokens(self, vector: Term) -> bool:
        """Whether a vector isn't one of an element for each expert, or each chosen one: of such, scores are named."""
        return all(vector.size not in (ranking.scores.size, ranking.count) for ranking in self._rankings)

    def _chosen(self, values: Term, ranking: Ranking) -> Term:
        return self._terms.chosen(values, ranking.scores, ranking.number, ranking.count)
