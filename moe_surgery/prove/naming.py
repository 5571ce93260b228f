"""Which known mistake a wrong block makes: the mutant that its own answers are nearest to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.prove.asking import Block, Call, ask
from moe_surgery.prove.ground import Ground
from moe_surgery.prove.probe import ZERO

# How many times nearer than the truth a mutant is that says anything of a block which isn't it.
_NEARER = 4.0
# A batch that no block is known to branch at.
_BATCH = 72


@dataclass(frozen=True)
class Likeness:
    """The mutants whose outputs are nearest to a block's: their ``names``, and how far they are, worst token.

    ``same`` says that they are as near as rounding allows, so that the block does what they do.
    """

    names: tuple[str, ...]
    distance: float
    same: bool

    def __str__(self) -> str:
        """Such as ``computed with its correction bias left out``, for after a colon."""
        listed = " or ".join(self.names)
        return listed if self.same else f"nearest known mistake: {listed} ({self.distance:.2g} from it)"


def liken(answers: Tensor, ground: Ground) -> Likeness | None:
    """Hold a block's ``answers`` [N, H] against every mutant; None if it is like none of them.

    Tokens with more than one legitimate choice of experts are left out, and the zero token.
    """
    clear = (ground.routing.choices() == 1) & (ground.probes.family != ZERO)
    off = ground.truth.distance_from(answers, torch.arange(len(answers), device=answers.device))
    bounds = off.new_tensor(ground.noise)[ground.probes.family] * ground.slack
    found: list[tuple[float, float, str]] = []
    for name, y, tokens in _cases(ground):
        mine = clear[tokens]
        tokens, y = tokens[mine], y[mine]
        if not len(tokens):
            continue
        apart = (answers[tokens].double() - y).norm(dim=-1) / ground.truth.norms[tokens]
        # Against the truth on the same tokens: a mutant that is the truth there explains nothing.
        if not bool((off[tokens] > bounds[tokens]).any()):
            continue
        found.append((float((apart / bounds[tokens]).max()), float(apart.max()), name))
    if not found:
        return None
    beyond, distance, _ = min(found)
    same = beyond <= 2.0  # the block's rounding, and that of what the mutant was made of
    names = [name for far, _, name in found if (far <= 2.0 if same else far == beyond)]
    truth = float((off[clear] / bounds[clear]).max()) if bool(clear.any()) else torch.inf
    return Likeness(tuple(names[:2]), distance, same) if same or _NEARER * beyond < truth else None


def answers_of(block: Block, ground: Ground) -> Tensor:
    """What a block answers about every probe [N, H]. Raises :class:`~moe_surgery.prove.asking.Misconduct`."""
    everyone = torch.arange(len(ground.probes.x), device=ground.probes.x.device)
    calls = [Call(f"{len(part)} tokens", ground.probes.x[part][None], part) for part in everyone.split(_BATCH)]
    return torch.cat([ask(block, call) for call in calls])


def _cases(ground: Ground) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every mutant, each of its cases by itself: its name, outputs and tokens."""
    for twin in ground.twins:
        if twin.case is None:
            yield twin.name, twin.y, twin.tokens
        else:
            for case in twin.case.unique().tolist():
                mine = twin.case == case
                yield twin.name.format(case=case), twin.y[mine], twin.tokens[mine]
