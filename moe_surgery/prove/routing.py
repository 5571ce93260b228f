"""Which experts a right block may choose for each token: one choice, or several where it is a near tie.

Where rank k and k+1 lie within the router's own rounding noise, in what it ranks (logits or scores) and in the dtype
that it ranks it in, two right blocks may choose different experts. Such a token is a near tie, with several legitimate
outputs. A token with a clear gap has one: two saturated scores are no tie in a block that ranks logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from moe_surgery.prove.metrics import slack
from moe_surgery.prove.probe import FAMILIES, ZERO, Probes
from moe_surgery.spec import MoESpec
from moe_surgery.targets.formula import EXACT, capped
from moe_surgery.targets.reference import own_scores, ranking, router_scores, scores_of, unrounded
from moe_surgery.weights.tensors import BlockTensors

# What is ranked is rounded, and so is what it is computed from: two roundings for each of two experts, each of half an
# eps, and as many again under a soft cap.
ROUNDINGS = 2
# A token with more legitimate choices than this says too little to be worth asking.
MOST_CHOICES = 24
# How often a router whose other choices aren't listed is asked again with other rounding errors.
_SHAKES = 16


@dataclass(frozen=True, eq=False)
class Routing:
    """The truth's routing of N tokens, in float64: everything sorted by score, best first.

    ``order`` [N, E] expert ids; ``scores`` and ``logits`` [N, E], in id order. ``tokens`` [R] and ``ranks`` [R, k] are
    the legitimate choices: rows 0..N-1 are each token's own (ranks 0..k-1), the rest are the other choices that the
    router's noise allows. ``sure`` [N] is how many ranks belong to every choice. A
    token that isn't ``decidable`` [N] has too many choices to list them.
    """

    order: Tensor
    scores: Tensor
    logits: Tensor
    tokens: Tensor
    ranks: Tensor
    sure: Tensor
    decidable: Tensor

    def ids(self) -> Tensor:
        """Expert ids [R, k] of every legitimate choice."""
        return self.order[self.tokens].gather(1, self.ranks)

    def keep(self, mask: Tensor) -> Routing:
        """The routing of those tokens that ``mask`` [N] names."""
        rows = mask[self.tokens]
        place = mask.cumsum(0) - 1
        return Routing(
            order=self.order[mask],
            scores=self.scores[mask],
            logits=self.logits[mask],
            tokens=place[self.tokens[rows]],
            ranks=self.ranks[rows],
            sure=self.sure[mask],
            decidable=self.decidable[mask],
        )

    def choices(self) -> Tensor:
        """How many legitimate choices each token has [N]."""
        return torch.bincount(self.tokens, minlength=len(self.order))

    @property
    def near_ties(self) -> int:
        return int((self.choices() > 1).sum())


def route(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Routing:
    """Every legitimate choice of experts for every token."""
    if not spec.router.follows_logits or spec.experts.weights_on == "input":
        return _shaken_route(spec, tensors, probes)
    k, count = spec.router.top_k, len(probes.x)
    logits, scores = router_scores(spec, tensors.router, probes.x, torch.float64, bias=tensors.router_bias)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    tokens, ranks = list(range(count)), [tuple(range(k))] * count
    sure, decidable = [k] * count, [True] * count
    if k < spec.router.num_experts:
        family, noise = probes.family.tolist(), _router_noise(spec, tensors, probes, logits).cpu()
        values = ranking(spec, logits, scores, tensors, EXACT)
        rounding = _rounding(spec, logits, values, probes.x.dtype)
        steps, values, rounding = (part.gather(1, order).cpu() for part in (logits, values, rounding))
        for token in (~_clear(steps, values, rounding, noise, k)).nonzero().flatten().tolist():
            if family[token] == ZERO:
                decidable[token] = spec.experts.nothing_of_zero
                continue
            ladder = _Ladder(steps[token], values[token], rounding[token], float(noise[token]))
            found = ladder.other_choices(k)
            decidable[token] = found is not None
            sure[token] = ladder.certain(k)
            tokens += [token] * len(found or ())
            ranks += found or ()
    return Routing(
        order=order,
        scores=scores,
        logits=logits,
        tokens=torch.tensor(tokens, device=order.device),
        ranks=torch.tensor(ranks, device=order.device),
        sure=torch.tensor(sure, device=order.device),
        decidable=torch.tensor(decidable, device=order.device),
    )


def _shaken_route(spec: MoESpec, tensors: BlockTensors, probes: Probes) -> Routing:
    """The choices of a router whose ranking isn't that of its logits, or that is the model's own.

    What else it might have chosen isn't listed. A token whose choice changes with the router's rounding noise
    (measured, then added with random signs) isn't decidable. Of a router of the model's own, those count as chosen that
    it gives a weight other than zero; a token that it sends to one expert twice isn't decidable.
    """
    k, x = spec.router.top_k, probes.x
    logits, scores = router_scores(spec, tensors.router, x, torch.float64, tensors.routing, tensors.router_bias)
    noise = _router_noise(spec, tensors, probes, logits)[:, None]
    generator = torch.Generator("cpu").manual_seed(len(x))
    ranked = unrounded(spec, logits, scores, tensors)
    chosen = _chosen(ranked, k)
    decidable, sure = torch.ones_like(chosen[:, 0]), torch.full_like(chosen[:, 0], k, dtype=torch.int64)
    if spec.router.own and tensors.routing is not None:
        chosen, weights = chosen & (ranked != 0), tensors.routing(x, logits.float())[0]
        sure = chosen.sum(-1)
        decidable = (sure > 0) & (sure == (weights != 0).sum(-1))
    for _ in range(_SHAKES if k < spec.router.num_experts else 0):
        signs = torch.randint(0, 2, logits.shape, generator=generator, device="cpu").to(logits) * 2 - 1
        shaken = _shaken(spec, tensors, x, logits, signs * noise / 2, signs)
        other = _chosen(shaken, k) & (shaken != 0) if spec.router.own else _chosen(shaken, k)
        decidable &= (other == chosen).all(-1)
    everyone = torch.arange(len(x), device=logits.device)
    zero = (probes.family == ZERO) & spec.experts.nothing_of_zero
    return Routing(
        order=ranked.argsort(dim=-1, descending=True, stable=True),
        scores=scores,
        logits=logits,
        tokens=everyone,
        ranks=torch.arange(k, device=logits.device).repeat(len(x), 1),
        sure=sure,
        decidable=decidable | zero,
    )


def _shaken(spec: MoESpec, tensors: BlockTensors, x: Tensor, logits: Tensor, moved: Tensor, signs: Tensor) -> Tensor:
    """The ranking [T, E] of logits that rounding has ``moved``, itself rounded."""
    logits = logits + moved
    if spec.router.own:
        return own_scores(tensors.routing, x, logits, torch.float64, moved).abs()
    scores = scores_of(spec, logits, EXACT)
    if spec.router.groups is not None:  # which are scored before anything is ranked
        scores = scores + signs * _rounding(spec, logits, scores, x.dtype)
    ranked = ranking(spec, logits, scores, tensors, EXACT)
    return ranked + signs * _rounding(spec, logits, ranked, x.dtype).clamp(1e-30, 1e30)


def _rounding(spec: MoESpec, logits: Tensor, ranked: Tensor, native: torch.dtype) -> Tensor:
    """How far apart [N, E] what is ranked must be from another expert's for the block's own rounding not to tie them.

    A softmax's exponent, a difference of float32 logits, makes its rounding greater.
    """
    router = spec.router
    steps = [router.ranked_dtype, *([router.scores_dtype] if router.ranks == "scores" else [])]
    steps += [router.cap_dtype] * 2 if router.soft_cap is not None else []
    sizes = [torch.finfo(native if step == "native" else torch.float32).eps for step in steps]
    relative = torch.full_like(ranked, ROUNDINGS * max(sizes) * (2 if router.soft_cap is not None else 1))
    if router.ranks == "scores" and router.scoring == "softmax":
        shown = capped(router, logits, EXACT)
        exponents = shown.amax(-1, keepdim=True) - shown
        relative += exponents * ROUNDINGS * min(max(sizes), torch.finfo(torch.float32).eps)
    return relative * ranked.abs().where(ranked.isfinite(), 0.0)


def _chosen(ranked: Tensor, k: int) -> Tensor:
    """Which experts [T, E] have the ``k`` highest ranks."""
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(k, -1).indices, True)


def _router_noise(spec: MoESpec, tensors: BlockTensors, probes: Probes, logits: Tensor) -> Tensor:
    """How far apart two logits of a token [N] must be to be clearly apart in the block's dtype, from measured errors.

    A token's error is the largest one over the experts, but not less than the median of the token's family: over few
    experts a token may be lucky.
    """
    rounded, _ = router_scores(spec, tensors.router, probes.x, None, tensors.routing, tensors.router_bias)
    noise = (rounded.to(torch.float64) - logits).abs().amax(-1)
    for family in range(len(FAMILIES)):
        mine = probes.family == family
        if bool(mine.any()):
            noise[mine] = noise[mine].clamp_min(float(noise[mine].median()))
    return noise * slack(spec.hidden, rounded.dtype)


def _clear(logits: Tensor, ranked: Tensor, rounding: Tensor, noise: Tensor, k: int) -> Tensor:
    """Which tokens' ``k`` first of [T, E] in order every right block chooses: :meth:`_Ladder.clear` of all of them."""
    gap, apart = (values[:, k - 1] - values[:, k] for values in (logits, ranked))
    return (gap > noise) & (apart > rounding[:, k - 1 : k + 1].amax(1))


class _Ladder:
    """One token's experts in order of their scores, and which of them are clearly apart."""

    def __init__(self, logits: Tensor, ranked: Tensor, rounding: Tensor, noise: float) -> None:
        self.logits, self.noise = logits.tolist(), noise
        self.ranked, self.rounding = ranked.tolist(), rounding.tolist()

    def clear(self, high: int, low: int) -> bool:
        """Does every right block rank ``high`` above ``low``? Both are ranks.

        A gap between logits may still vanish in what is ranked: where a sigmoid or a soft cap saturates, or in a
        softmax's exponent.
        """
        gap = self.logits[high] - self.logits[low]
        rounding = max(self.rounding[high], self.rounding[low])
        return gap > self.noise and self.ranked[high] - self.ranked[low] > rounding

    def certain(self, k: int) -> int:
        """How many ranks every right block chooses."""
        return next(rank for rank in range(k + 1) if not self.clear(rank, k))

    def other_choices(self, k: int) -> list[tuple[int, ...]] | None:
        """The other k ranks that a right block may choose; None if there are too many to list."""
        first, last = self.certain(k), k + 1
        while last < len(self.logits) and not self.clear(k - 1, last):
            last += 1
        found: list[tuple[int, ...]] = []
        for number, chosen in enumerate(combinations(range(first, last), k - first)):
            if number > 16 * MOST_CHOICES or len(found) == MOST_CHOICES:
                return None
            best_left_out = min(set(range(first, last)).difference(chosen))
            if best_left_out != k and not self.clear(best_left_out, chosen[-1]):
                found.append((*range(first), *chosen))
        return found
