"""Probes: the tokens a block is asked about, made from its router's weights and a seed.

There are five families. ``unit`` holds tokens of root mean square 1, as a norm before the block makes them: random
ones, one steered to each expert, and near ties between the last expert chosen and the first one not. ``small`` and
``large`` are random tokens at other scales, for what shows only there (a clamp, an overflow, an epsilon). ``zero`` is
the all-zero token. ``saturated`` tokens have logits so large that scores round to 1 or 0, whatever the scale of the
router's weights. Errors are compared within a family, because rounding noise grows with the scale of the logits.

Everything is computed on the CPU in float64 and rounded to the block's dtype last, so that a seed means the same
tokens on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference import entering
from moe_surgery.weights.tensors import BlockTensors

UNIT, SMALL, LARGE, ZERO, SATURATED = range(5)
FAMILIES = ("unit", "small", "large", "zero", "saturated")
SCALES = (1.0, 2.0**-4, 2.0**3, 0.0)
ONE = 0.05
"""A routing weight is about 1 if it is no further from it: where it applies makes no difference that shows."""

_RANDOM = 64
_SCALED = 16
# Sizes of saturated tokens' logits, how many there are, and of the raised ones the spread and the height in that size.
_LOGITS = (10.0, 20.0, 40.0)
_SATURATED = 18
_SPREAD, _HEIGHT = 0.25, 0.6
# No token is larger than this: experts' outputs would overflow.
_LARGEST = 2.0**12
# Gaps between rank k and rank k+1, in units of eps(dtype) * largest logit: within the router's noise, and beyond it.
_GAPS = (0.0, 0.0, 0.0, 0.0, 8.0, 8.0, 32.0, 32.0, 128.0, 128.0)
_MORE = 14
# How far a steered token is pushed towards its expert, in units of the random token under it.
_PUSHES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
_STEPS = 500
# A steered expert's lead over its rival, in standard deviations of the token's logits, that counts as clear.
_CLEAR = 0.25
# How far beyond the clamp of the experts the median of their inputs lies, where probes are made to reach it.
_BEYOND_CLAMP = 1.5


@dataclass(frozen=True, eq=False)
class Probes:
    """``x`` [N, H] in the block's dtype and on its device, and each token's family [N] (an index of FAMILIES)."""

    x: Tensor
    family: Tensor

    def keep(self, mask: Tensor) -> Probes:
        """Those tokens that ``mask`` [N] names."""
        return Probes(self.x[mask], self.family[mask])

    def of(self, family: int) -> Tensor:
        """Indices of a family's tokens."""
        return (self.family == family).nonzero().flatten()


def make_probes(spec: MoESpec, router: Tensor, seed: int, tensors: BlockTensors | None = None) -> Probes:
    """The probes of a block with this router [E, H]; on its device and in its dtype.

    With ``tensors`` of experts that clamp, large tokens reach the clamp, and as far as can be without being routed
    otherwise for it: most of them lies where the router doesn't look.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = router.dtype if tensors is None else tensors.dtype
    weight = router.detach().to("cpu", torch.float64)
    k = spec.router.top_k
    bias = None if tensors is None or tensors.router_bias is None else tensors.router_bias.detach().to(weight)

    def random(count: int) -> Tensor:
        return unit(torch.randn(count, spec.hidden, generator=generator, dtype=torch.float64, device="cpu"))

    parts = [
        (UNIT, random(_RANDOM)),
        (UNIT, steer(weight, k, random(len(weight)), dtype)),
        # Whose scores are near to each other, only a router of known scoring tells.
        (UNIT, near_ties(weight, k, random(_gaps(spec, dtype)), dtype, bias)),
        (SMALL, random(_SCALED) * SCALES[SMALL]),
        (LARGE, random(_SCALED) * SCALES[LARGE]),
        (LARGE, _clamped(spec, tensors, weight, random(_SCALED))),
        (ZERO, random(1) * SCALES[ZERO]),
        (SATURATED, saturated(spec, weight, random(0 if spec.router.own else _SATURATED))),
    ]
    return Probes(
        torch.cat([x for _, x in parts]).to(dtype).to(router.device),
        torch.cat([torch.full((len(x),), family, device="cpu") for family, x in parts]).to(router.device),
    )


def saturated(spec: MoESpec, weight: Tensor, x: Tensor) -> Tensor:
    """The tokens ``x`` [n, H] at those scales that give their logits the sizes of ``_LOGITS``, one after another.

    Of every second one all logits are raised by as much, so that the choice lies between large ones: rank k + 1 is at
    ``_HEIGHT`` of the size. With more experts than the router's input has dimensions they are raised nearly alike.
    """
    k, experts = spec.router.top_k, len(weight)
    if k >= experts or len(x) == 0:
        return x[:0]
    wanted = x.new_tensor(_LOGITS).repeat_interleave(2).repeat(len(x))[: len(x), None]
    logits = x @ weight.T
    scale = wanted / logits.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-300)
    raised = (torch.arange(len(x), device="cpu") % 2 == 1)[:, None]
    scale = scale.where(~raised, scale * _SPREAD)
    lift = _HEIGHT * wanted - (logits * scale).topk(k + 1, -1).values[:, -1:]
    # The same by the rows' products takes a tenth of the time where experts are far fewer than dimensions.
    upwards = weight.T @ (torch.linalg.pinv(weight @ weight.T, hermitian=True) @ weight.new_ones(experts))
    x = x * scale + (lift * upwards).where(raised, 0.0)
    return x[x.pow(2).mean(-1).sqrt() < _LARGEST]


def _clamped(spec: MoESpec, tensors: BlockTensors | None, router: Tensor, x: Tensor) -> Tensor:
    """``x`` [n, H] with as much added where the router doesn't look as makes half of all gates exceed the clamp."""
    limit = spec.experts.limit
    if limit is None or tensors is None or len(router) >= spec.hidden:
        return x[:0]
    away = x.roll(1, 0)
    basis = torch.linalg.qr(router.T).Q
    away = unit(away - away @ basis @ basis.T)
    first = tensors.w13[0].detach().to("cpu", torch.float64)
    given = entering(tensors, away.to(tensors.w13.device), torch.float64).cpu()
    reach = (given @ first.T).abs().median().clamp_min(1e-300)
    return x + away * (_BEYOND_CLAMP * limit / reach)


def steer(weight: Tensor, k: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Row ``e`` of ``x`` [E, H] moved until a top-``k`` router chooses expert ``e``, ranking it first if possible.

    The least push that makes the expert first with room to spare is taken, so that the other experts' weights stay
    visible. Where no push does, :func:`_apart` looks for a token that ranks the expert among the k at least. Experts
    that can't be reached (a row inside the hull of the others) are left to the caller, which counts the visits.
    """
    experts = len(weight)
    if experts == 1:
        return x
    directions = towards(weight)
    everyone = torch.arange(experts, device="cpu")
    best, lead = x, torch.full_like(x[:, 0], -torch.inf)
    for push in _PUSHES:
        best, lead = _better(best, lead, unit(x + push * directions), _Ranking(weight, everyone, 1, dtype))
    missing = everyone[lead <= _CLEAR]
    if len(missing) == 0 or experts == k:
        return best
    ranking = _Ranking(weight, missing, k, dtype)
    found, lead = best[missing], ranking.lead(best[missing])
    for rank in dict.fromkeys((1, k)):
        for direction in _apart(weight, missing, rank):
            if bool((lead > _CLEAR).all()):
                break
            found, lead = _better(found, lead, unit(direction), ranking)
    return best.index_copy(0, missing, found)


def towards(weight: Tensor) -> Tensor:
    """For each expert the direction [E, H] that its logit rises in against the mean of all, of unit scale."""
    apart = weight - weight.mean(0)
    scaled: Tensor = apart / apart.norm(dim=-1, keepdim=True).clamp_min(1e-300) * weight.shape[1] ** 0.5
    return scaled


def _apart(weight: Tensor, experts: Tensor, rank: int) -> Iterator[Tensor]:
    """Directions [n, H] in which each expert's row comes to exceed all others, or all but ``rank - 1`` of them.

    Gilbert's algorithm (1966): the point nearest to the origin in the hull of the differences ``row - other row``. It
    converges to a direction that ranks the expert first, if there is one. With a greater rank the nearest rivals are
    passed over, which is a heuristic.
    """
    rows = weight[experts]
    point = rows - weight.mean(0)
    for _ in range(_STEPS):
        rivals = (point @ weight.T).scatter(1, experts[:, None], -torch.inf)
        step = rows - weight[rivals.topk(rank, -1).indices[:, -1]] - point
        length = -(step * point).sum(-1) / step.pow(2).sum(-1).clamp_min(1e-300)
        point = point + length.clamp(0, 1)[:, None] * step
        yield point


def _gaps(spec: MoESpec, dtype: torch.dtype) -> int:
    """How many near ties to make; more where they alone show that half precision isn't what experts are ranked in."""
    if spec.router.own:
        return 0
    wide = spec.router.logits_dtype == "float32" and torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
    return len(_GAPS) + (_MORE if wide else 0)


def near_ties(weight: Tensor, k: int, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``x`` [G, H] moved so that the logits of rank k and k+1 come as near to each other as ``_GAPS`` says, or meet."""
    if k == len(weight) or len(x) == 0:
        return x[:0]
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    gaps = torch.cat([x.new_tensor(_GAPS), x.new_zeros(len(x))])[: len(x)]
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # scores are never finer than float32
    for _ in range(4):
        logits = x @ weight.T + bias
        last, next_ = logits.topk(k + 1, -1).indices[:, -2:].T
        apart = weight[last] - weight[next_]
        wanted = gaps * eps * logits.abs().amax(-1) - (bias[last] - bias[next_])
        excess = ((apart * x).sum(-1) - wanted) / apart.pow(2).sum(-1).clamp_min(1e-300)
        x = unit(x - apart * excess[:, None])
    return x


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Tokens [n, H] against experts [n]: is token i's expert above the ``rank``-th best of the others?"""

    weight: Tensor
    experts: Tensor
    rank: int
    dtype: torch.dtype

    def lead(self, x: Tensor) -> Tensor:
        """The lead over that rival [n], in standard deviations of the token's logits."""
        logits = x.to(self.dtype).to(torch.float64) @ self.weight.T
        rivals = logits.scatter(1, self.experts[:, None], -torch.inf).topk(self.rank, -1).values
        gap = logits.gather(1, self.experts[:, None]).squeeze(1) - rivals[:, -1]
        return gap / logits.std(-1).clamp_min(1e-300)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to root mean square 1."""
    return x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-300)


def _better(best: Tensor, lead: Tensor, x: Tensor, ranking: _Ranking) -> tuple[Tensor, Tensor]:
    """The new tokens where the lead was not clear and has grown."""
    now = ranking.lead(x)
    better = (lead <= _CLEAR) & (now > lead)
    return torch.where(better[:, None], x, best), torch.where(better, now, lead)
