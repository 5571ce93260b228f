"""The metric: the worst token's relative L2 distance from the reference, with routing judged apart from values.

A near tie (:mod:`~moe_surgery.prove.routing`) has several legitimate outputs, and a block is held against the nearest
of them. Cosine is not used: a shared expert added twice keeps it above 0.97.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.prove.probe import FAMILIES, UNIT, ZERO

# Right blocks that round at the same places measured 0.5 to 1.5 times the noise of plain torch (bfloat16, float16);
# the rest is for those that round at others. It also covers a gap between two logits, each twice the noise off.
SLACK = 4.0
# Plain torch's matrix products add terms in blocks of about this many.
BLOCK = 256
# A token whose reference output nearly cancels is measured against this fraction of its family's median norm.
NORM_FLOOR = 0.01


def slack(terms: int, dtype: torch.dtype) -> float:
    """How many times the measured noise a right block may be off, where its longest sums have ``terms`` terms.

    A kernel that adds n terms one after another is off by about sqrt(n / 256) times as much as one that adds blocks of
    256 terms and then the blocks, if the sum is kept in the block's own dtype. Sums of half-precision terms are kept in
    float32, where this doesn't show.
    """
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        return SLACK
    return float(SLACK * max(1.0, (terms / BLOCK) ** 0.5))


def luck(width: int) -> float:
    """How many times less than typical the measured noise may be by chance, in a block whose narrowest layer is this.

    An error is the norm of about ``width`` independent roundings, which spreads by 1 / sqrt(2 width) of itself, and so
    does the noise that it is held against: together 1 / sqrt(width), of which this allows two. That is 1.7 for a toy of
    width 8 and 1.1 for one of 384.
    """
    return 1.0 + 2.0 * float(width**-0.5)


class Truth:
    """The legitimate outputs of the probes, and distances from them.

    ``outputs`` [R, H] in float64: rows 0..N-1 are each token's own, ``tokens`` [R] says whose each row is. ``family``
    [N] is each token's family.
    """

    def __init__(self, outputs: Tensor, tokens: Tensor, family: Tensor) -> None:
        self.outputs = outputs
        self.family = family
        self.norms = outputs.norm(dim=-1)
        # All that is small is worked out on the CPU: on a GPU it would be a launch, or a wait, for every step.
        families, whose, norms = family.cpu(), tokens.cpu(), self.norms.cpu()
        own = torch.arange(len(families), device="cpu")
        typical = [float(norms[: len(own)][families == number].median()) for number in range(len(FAMILIES))]
        typical[ZERO] = typical[UNIT]
        # What a distance from each row is divided by.
        least = NORM_FLOOR * norms.new_tensor(typical).nan_to_num()[families[whose]]
        self.norms = self.norms.maximum(least.to(outputs.device))
        # Row r of others holds every token's r-th other legitimate output, or its own where it has fewer.
        rows: list[Tensor] = []
        others = whose[len(own) :]
        place = torch.arange(len(own), len(whose), device="cpu")
        while len(others):
            first = torch.ones_like(others, dtype=torch.bool)
            first[1:] = others[1:] != others[:-1]
            row = own.clone()
            row[others[first]] = place[first]
            rows.append(row)
            others, place = others[~first], place[~first]
        self.others = (torch.stack(rows) if rows else own.new_empty(0, len(own))).to(tokens.device)

    def distance_from(self, y: Tensor, rows: Tensor) -> Tensor:
        """Relative distance [M] of outputs [M, H] from the given rows [M] of the truth."""
        distance = (y.to(torch.float64) - self.outputs[rows]).norm(dim=-1)
        relative = distance / self.norms[rows]
        # 0 / 0: the truth's whole family is zero, and so is the output.
        relative = relative.where((distance != 0) | (self.norms[rows] != 0), 0.0)
        return relative.where(relative.isfinite(), torch.inf)

    def distance(self, y: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Relative distance [M] of outputs [M, H] for ``tokens`` [M], and where another choice was nearer [M].

        An output that isn't finite is infinitely far.
        """
        own = self.distance_from(y, tokens)
        rows = self.others[:, tokens]
        choice, place = (rows != tokens).nonzero(as_tuple=True)
        best = own.scatter_reduce(0, place, self.distance_from(y[place], rows[choice, place]), "amin")
        return best, best < own

    def worst(self, distance: Tensor, tokens: Tensor) -> Tensor:
        """The greatest distance in each family, [families]; 0 where ``tokens`` has none of it."""
        worst = distance.new_zeros(len(FAMILIES))
        return worst.scatter_reduce(0, self.family[tokens], distance, "amax")
