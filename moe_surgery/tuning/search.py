"""The fastest tiles for a number of tokens: each product's are varied in turn, and whole blocks are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe_surgery.kernels.choice import Choice, serving
from moe_surgery.timing.graphs import graph_us, graphs_us_in_turns
from moe_surgery.tuning.bench import Bench
from moe_surgery.tuning.candidates import candidates

_ORDER = ("gate_up", "down", "add", "logits")
_ROUNDINGS = 4
"""Two right choices are apart by a rounding of what lies between the products, and one of the output."""
_E4M3 = 8
"""The same where what lies between is rounded to e4m3 once more, which makes an eighth of some last bits."""


@dataclass(frozen=True)
class Tuned:
    """What serves ``tokens`` from now on; its microseconds, and those of what did ``before``, timed in turns.

    ``wrong`` says that the fastest was passed over because it computed something else.
    """

    tokens: int
    choice: Choice
    us: float
    before: float
    wrong: bool = False


def tuned(bench: Bench, tokens: int, served: Sequence[Choice], deadline: float) -> Tuned:
    """Look for something faster than the row of ``served`` until ``deadline``, on the clock of ``time.monotonic``."""
    old = serving(served, tokens)
    new = search(bench, tokens, old, deadline)
    if new is None:
        us = _us(bench, tokens, old)
        return Tuned(tokens, replace(old, tokens=tokens), us, us)
    us, before = graphs_us_in_turns(bench.calls(tokens, new), bench.calls(tokens, old))
    roundings = _E4M3 if bench.terms.scaled else _ROUNDINGS
    right = _distance(bench, tokens, new, old) < roundings * torch.finfo(bench.layers[0].router.dtype).eps
    if us < before and right:
        return Tuned(tokens, new, us, before)
    return Tuned(tokens, replace(old, tokens=tokens), before, before, wrong=not right)


def _distance(bench: Bench, tokens: int, new: Choice, old: Choice) -> float:
    """How far the outputs of two choices are apart for the same tokens, relative."""
    one, two = (bench.calls(tokens, choice)[0]().double() for choice in (new, old))
    return float((one - two).norm() / two.norm())


def search(bench: Bench, tokens: int, old: Choice, deadline: float) -> Choice | None:
    """The fastest that was found by ``deadline``, from ``old`` on in its own path; None if nothing ran."""
    best: tuple[float, Choice | None] = math.inf, None
    for path, products in candidates(bench.terms, tokens):
        first = Choice.of({"tokens": tokens, "path": path, **{name: tiles[0] for name, tiles in products.items()}})
        choice = replace(old, tokens=tokens) if path == old.path else first
        us = _us(bench, tokens, choice)
        # Where experts are given, there are no logits.
        for name in _ORDER[:-1] if bench.terms.given else _ORDER:
            for tiles in products.get(name, []):
                if time.monotonic() > deadline:
                    break
                if tiles == getattr(choice, name):
                    continue
                trial = Choice.of({**vars(choice), name: tiles})
                took = _us(bench, tokens, trial)
                if took < us:
                    us, choice = took, trial
        if us < best[0]:
            best = us, choice
    return best[1]


def _us(bench: Bench, tokens: int, choice: Choice) -> float:
    """Microseconds of a block; infinite where the tiles need more of the GPU than it has."""
    from triton.runtime.errors import OutOfResources

    try:
        return graph_us(bench.calls(tokens, choice), replays=20 if tokens < 1024 else 6)
    except OutOfResources:
        torch.cuda.synchronize()
        return math.inf
