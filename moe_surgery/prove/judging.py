"""Judging answers: is an error beyond what a right block may be off, and do the mutants show that it would be seen?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from moe_surgery.prove.metrics import Truth
from moe_surgery.prove.mutants import Twin
from moe_surgery.prove.probe import FAMILIES, ZERO
from moe_surgery.prove.verdict import Mutant

FEWEST_MUTANTS = 10
_TOGETHER = 6
"""Mutants that are measured at once; their outputs are copied for it."""


class Yardstick(Protocol):
    """What answers are held against: the ``truth``, the ``noise`` of each family, and how many times that is allowed.

    ``floor`` is the least error that is worth telling from zero.
    """

    @property
    def truth(self) -> Truth: ...
    @property
    def noise(self) -> list[float]: ...
    @property
    def slack(self) -> float: ...
    @property
    def floor(self) -> float: ...


def measure(
    twins: Sequence[Twin], ground: Yardstick, errors: Sequence[float], margin: float
) -> Iterator[tuple[Mutant, float]]:
    """Each mutant's hardest case in the family that shows it best, and its distance over what is needed to tell it."""
    for start in range(0, len(twins), _TOGETHER):
        yield from _measured(twins[start : start + _TOGETHER], ground, errors, margin)


def _measured(
    twins: Sequence[Twin], ground: Yardstick, errors: Sequence[float], margin: float
) -> Iterator[tuple[Mutant, float]]:
    """As :func:`measure`, of some mutants at once: on a GPU one takes as long as all."""
    families = len(FAMILIES)
    cases = [torch.zeros_like(twin.tokens) if twin.case is None else twin.case for twin in twins]
    counts = [1 if twin.case is None else int(twin.case.max()) + 1 for twin in twins]
    starts = [sum(counts[:at]) for at in range(len(counts))]
    tokens = torch.cat([twin.tokens for twin in twins])
    distance, _ = ground.truth.distance(torch.cat([twin.y for twin in twins]), tokens)
    case = torch.cat([each + start for each, start in zip(cases, starts, strict=True)])
    worst = distance.new_zeros(sum(counts) * families)
    worst = worst.scatter_reduce(0, case * families + ground.truth.family[tokens], distance, "amax")
    worst = worst.view(-1, families).cpu()
    worst[:, ZERO] = 0.0  # the zero token has no output to compare mutants by
    floor = worst.new_tensor([max(error, ground.floor) for error in errors])
    power = worst / torch.maximum(margin * floor, ground.slack * worst.new_tensor(ground.noise))
    best = power.amax(1)
    for twin, start, count in zip(twins, starts, counts, strict=True):
        hardest = int(best[start : start + count].argmin())
        row = start + hardest
        family = int(power[row].argmax())
        found = float(worst[row, family])
        name = twin.name.format(case=hardest)
        yield Mutant(name, found, FAMILIES[family], found / float(floor[family])), float(best[row])


def beyond(errors: Sequence[float], ground: Yardstick) -> list[float]:
    """``errors`` of each family, in limits of plain torch."""
    return [error / (ground.slack * noise) for error, noise in zip(errors, ground.noise, strict=True)]


def beyond_noise(
    what: str, errors: Sequence[float], where: Sequence[str], ground: Yardstick, allowed: float = 1.0
) -> list[str]:
    """What is wrong with a block's numbers, in the family where they are worst for their noise.

    ``allowed`` is how many limits of plain torch a right block may be off.
    """
    limits = beyond(errors, ground)
    family = max(range(len(FAMILIES)), key=limits.__getitem__)
    if limits[family] <= allowed:
        return []
    error, noise, place, times = errors[family], ground.noise[family], where[family], allowed * ground.slack
    if math.isinf(error):
        return [f"{what}: an output is not finite on {place}, where the reference is finite"]
    return [
        f"{what}: it is {error:.2g} from the reference at a {FAMILIES[family]} token ({place}), "
        f"and {times:.2g} × the noise of the dtype is {times * noise:.2g}"
    ]


def power_faults(mutants: Sequence[tuple[Mutant, float]], ground: Yardstick, margin: float) -> list[str]:
    """Why the check proves nothing: mutants that it can't tell from the truth, or too few of them."""
    faults = []
    if weak := [mutant for mutant, power in mutants if not power >= 1]:
        listed = ", ".join(f"“{mutant.name}” ({mutant.distance:.2g} away)" for mutant in weak[:3])
        more = f" and {len(weak) - 3} more" if len(weak) > 3 else ""
        faults.append(
            f"the check has no power here: these weights and this dtype can't tell {listed}{more} from the truth "
            f"(needed: {margin:g} × the block's error and {ground.slack:.2g} × the noise)"
        )
    if len(mutants) < FEWEST_MUTANTS:
        faults.append(f"only {len(mutants)} mutants apply to this block, {FEWEST_MUTANTS} are needed")
    return faults
