"""Which mistake a block makes, told from its own answers: are they those of a mutant, or those of the truth?

A proof asks beforehand whether a mutant would be noticed. Here the answers are known, so that less is needed to tell
two hypotheses apart: whether the answers lie much nearer to the one than to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.prove.asking import Block, Call, ask
from moe_surgery.prove.ground import Ground
from moe_surgery.prove.probe import ZERO

NEARER = 2.0
"""How many times nearer to one of two hypotheses answers are that decide for it."""
# A batch that no block is known to branch at.
_BATCH = 72
# An error that is worth telling from none, in limits of a right block.
_LEAST = 0.05


@dataclass(frozen=True)
class Contrast:
    """A mutant and a block's answers. ``ratio`` is how many times farther from it than from the truth these are.

    ``apart`` is the worst token's distance from the mutant, and ``beyond`` the same in limits of a right block.
    """

    name: str
    ratio: float
    apart: float
    beyond: float

    @property
    def same(self) -> bool:
        """Whether the block does what the mutant does: both round, and so may be off twice as far as one."""
        return self.ratio * NEARER <= 1 and self.beyond <= 2.0


def contrasts(answers: Tensor, ground: Ground) -> list[Contrast]:
    """A block's ``answers`` [N, H] held against every mutant and the truth, on the same tokens; the likest first.

    Tokens with more than one legitimate choice of experts are left out, and the zero token.
    """
    clear = (ground.routing.choices() == 1) & (ground.probes.family != ZERO)
    off = ground.truth.distance_from(answers, torch.arange(len(answers), device=answers.device))
    limits = off.new_tensor(ground.noise)[ground.probes.family] * ground.slack
    found = []
    for name, y, tokens in _cases(ground):
        mine = clear[tokens]
        tokens, y = tokens[mine], y[mine]
        if len(tokens):
            apart = (answers[tokens].double() - y).norm(dim=-1) / ground.truth.norms[tokens]
            from_truth = _typical(off[tokens] / limits[tokens]).clamp_min(_LEAST)
            ratio = float(_typical(apart / limits[tokens]) / from_truth)
            found.append(Contrast(name, ratio, float(apart.max()), float((apart / limits[tokens]).max())))
    return sorted(found, key=lambda contrast: contrast.ratio)


def named(found: list[Contrast]) -> str | None:
    """What ``found`` says that a wrong block does; None if it is like none of the mutants."""
    same = list(dict.fromkeys(contrast.name for contrast in found if contrast.same))
    if same:
        return " or ".join(same[:2])
    if found and found[0].ratio * NEARER <= 1:
        return f"nearest known mistake: {found[0].name} ({found[0].apart:.2g} from it)"
    return None


def answers_of(block: Block, ground: Ground) -> Tensor:
    """What a block answers about every probe [N, H]. Raises :class:`~moe_surgery.prove.asking.Misconduct`."""
    everyone = torch.arange(len(ground.probes.x), device=ground.probes.x.device)
    calls = [Call(f"{len(part)} tokens", ground.probes.x[part][None], part) for part in everyone.split(_BATCH)]
    return torch.cat([ask(block, call) for call in calls])


def _typical(x: Tensor) -> Tensor:
    """The root of the mean square."""
    return x.pow(2).mean().sqrt()


def _cases(ground: Ground) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every mutant, each of its cases by itself: its name, outputs and tokens."""
    for twin in ground.twins:
        if twin.case is None:
            yield twin.name, twin.y, twin.tokens
        else:
            for case in twin.case.unique().tolist():
                mine = twin.case == case
                yield twin.name.format(case=case), twin.y[mine], twin.tokens[mine]
