"""Choices of one expert after the other, of which each leaves out what those before it chose: they are one top-k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.top_k import Ranking
from moe_surgery.read.record.flow import Choice

_POSITIVE = ("softmax", "sigmoid")  # zero is less than any of these


def joined(
    seen: Sequence[Sequence[Ranking]], choices: Sequence[Choice], terms: Terms, bare: Callable[[Term], Term]
) -> tuple[list[list[Ranking]], tuple[Choice, ...]]:
    """What every token met, choice by choice, where choices that follow one another are the first of them.

    ``choices`` are changed alike, and keep their places. ``bare`` takes the rounding off a term.
    """
    found: list[list[Ranking]] = []
    changed = list(choices)
    for tokens in seen:
        last = found[-1] if found else []
        ranked = [_left(one, other, terms, bare) for one, other in zip(last, tokens, strict=True)] if last else [None]
        if all(scores is not None for scores in ranked):
            found[-1] = [_both(*pair) for pair in zip(last, tokens, ranked, strict=True)]
            number, after = last[0].number, choices[tokens[0].number]
            first = changed[number]
            rows = [choice.ids.reshape(len(tokens), -1) for choice in (first, after)]
            changed[number] = replace(first, k=first.k + after.k, ids=torch.cat(rows, 1))
        else:
            found.append(list(tokens))
    return found, tuple(changed)


def _left(one: Ranking, other: Ranking, terms: Terms, bare: Callable[[Term], Term]) -> Term | None:
    """The scores of which ``one`` chose the best, and ``other`` the best of what is left; None if it isn't so.

    The second may rank logits where the first ranks their softmax, or sigmoid: whichever has the finer steps is told.
    """
    scores, left = bare(one.scores), bare(other.scores)
    if other.count != 1 or one.count != len(one.parts or one.ids) or not (one.largest and other.largest):
        return None
    if left.op != "vec" or left.size != scores.size or len(other.ids) != 1:
        return None
    out = {left.args[place].args[0] if left.args[place].op == "const" else None for place in one.ids}
    known = [scores, bare(scores.args[0])] if scores.op in _POSITIVE else [scores]
    for base in known:
        same = all(
            place in one.ids or bare(element) is bare(terms.elem(base, place))
            for place, element in enumerate(left.args)
        )
        if same and (out == {-math.inf} or (out == {0.0} and base.op in _POSITIVE)):
            return base
    return None


def _both(one: Ranking, other: Ranking, scores: Term | None) -> Ranking:
    parts = (*(one.parts or (one.number,)), other.number)
    return replace(one, scores=scores or one.scores, count=one.count + 1, ids=(*one.ids, *other.ids), parts=parts)
