"""The top-ks that a token meets: one chooses experts, and others only the groups of experts that it may choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.meaning.wholes import extended
from moe_surgery.read.parse.mlp import short
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Groups, GroupScore


@dataclass(frozen=True, eq=False)
class Ranking:
    """One top-k as one token met it: what it ranked, how many it took, and which it was told to take.

    ``parts`` are the numbers of those that chose one after the other, if it is made of several.
    """

    number: int
    scores: Term
    count: int
    ids: tuple[int, ...]
    largest: bool
    parts: tuple[int, ...] = ()


class Rankings:
    """All top-ks of one token. ``bare`` takes the rounding off a term."""

    def __init__(self, rankings: Sequence[Ranking], terms: Terms, bare: Callable[[Term], Term]) -> None:
        self._rankings, self._terms, self._bare = rankings, terms, bare

    @property
    def whole(self) -> list[Ranking]:
        """Those that were made once for the token, of its highest."""
        return [ranking for ranking in self._rankings if ranking.largest and len(ranking.ids) == ranking.count]

    @property
    def only(self) -> Ranking | None:
        """The only one that there is, of whichever number of experts."""
        return self._rankings[0] if len(self._rankings) == len(self.whole) == 1 else None

    @property
    def outside(self) -> bool:
        """Whether the token was told to take some that it masks: a record chooses without looking at groups."""
        masked = [(ranking, self._bare(ranking.scores)) for ranking in self.whole]
        return any(
            scores.op == "vec" and any(scores.args[place].op == "const" for place in ranking.ids)
            for ranking, scores in masked
        )

    def ungrouped(self, ranked: Term, number: int) -> tuple[Term, Groups | None]:
        """The scores that groups let through, as they are rounded, and the groups that did."""
        elements: tuple[Term, ...] = ranked.args
        kept = [place for place, element in enumerate(elements) if element.op != "const"]
        if not kept:
            raise Unreadable("no expert may be chosen")
        vectors = {extended(self._terms, elements[place], place, len(elements)) for place in kept}
        whole = vectors.pop()
        if whole is None or vectors:
            raise Unreadable(f"experts are ranked by {short(ranked)}")
        base = self._bare(whole)
        outside = {element.args[0] for element in elements if element.op == "const"}
        if not outside:
            return whole, None
        for ranking in self._rankings:
            if ranking.number != number and (score := self._group_score(ranking, base)) is not None:
                count = ranking.scores.size
                mine = len(elements) // count
                if {place // mine for place in kept} <= set(ranking.ids) and len(kept) == mine * ranking.count:
                    if len(outside) > 1 or not ranking.largest:
                        break
                    return whole, Groups(count, ranking.count, score, outside.pop())
        raise Unreadable("experts are left out of the ranking by what isn't a choice among equal groups of them")

    def _group_score(self, ranking: Ranking, base: Term) -> GroupScore | None:
        """How ``ranking`` scores groups, if it ranks equal groups of the scores ``base``."""
        scores = self._bare(ranking.scores)
        count = scores.size
        if scores.op != "vec" or base.size % count:
            return None
        width, found = base.size // count, set()
        for group, score in enumerate(scores.args):
            part = self._terms.part(base, group * width, (group + 1) * width)
            score = self._bare(score)
            inner = self._bare(score.args[0]) if score.op in ("largest", "sum") else score
            if score.op == "largest" and inner is self._bare(part):
                found.add("max")
            elif score.op == "sum" and inner is self._bare(part) and width == 2:
                found.add("top2")
            elif score.op == "sum" and inner.op == "chosen" and inner.size == 2:
                if self._bare(inner.args[0]) is not self._bare(part) or inner.args[0] is not inner.args[1]:
                    return None
                found.add("top2")
            else:
                return None
        return cast(GroupScore, found.pop()) if len(found) == 1 else None

    def account(self, number: int, groups: Groups | None) -> None:
        """Every top-k must be the one that chooses experts, or take part in choosing groups, or take all there is."""
        by_number = {ranking.number: ranking for ranking in self._rankings}
        main = by_number.get(number)
        if main is None or len(main.ids) != main.count:
            alike = len({(ranking.count, ranking.scores.size, len(ranking.ids)) for ranking in self._rankings}) == 1
            parts = alike and len(self._rankings) > 1
            raise Unreadable("it ranks its tokens in parts" if parts else "it doesn't rank once per token")
        if not main.largest:
            raise Unreadable("it chooses the lowest scores")
        explained = {number}
        for ranking in self._rankings:
            grouped = groups is not None and ranking.scores.size == groups.count and ranking.count == groups.chosen
            if grouped or ranking.count == ranking.scores.size:
                explained.add(ranking.number)
                explained |= set(_numbers(ranking.scores))
        if left := set(by_number) - explained:
            raise Unreadable(
                f"it ranks {len(by_number)} times, and {len(left)} of them choose neither experts nor groups"
            )


def _numbers(term: Term) -> Iterator[int]:
    """The choices that a term is made of."""
    if term.op == "chosen":
        yield term.args[2]
    for arg in term.args:
        if isinstance(arg, Term):
            yield from _numbers(arg)
