"""Proving a block whose parts stay as they are and are put together anew, as quantised ones are.

What the routed experts and the shared expert compute is not on trial: they are the same modules with the same weights,
however these are stored. So the reference is made of what the old block was seen to compute, its routed output, its
shared expert's and the gate's logit, combined in float64 as the spec says. It is made for every call anew: kernels that
quantise activations may give a token other values in other company.

The noise is that of combining these parts in the block's own dtype, and of asking the old block again with the shared
expert's inner values rounded otherwise: what stands between its matrices is computed anew, and a layer that quantises
its input makes much of a last bit. Mutants are of the combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_surgery.prove.asking import Block, Misconduct, ask, calls
from moe_surgery.prove.judging import beyond_noise, measure, power_faults
from moe_surgery.prove.metrics import SLACK, Truth, luck
from moe_surgery.prove.mutants import Twin
from moe_surgery.prove.probe import FAMILIES, LARGE, SCALES, SMALL, UNIT, ZERO, Probes, unit
from moe_surgery.prove.verdict import Family, Verdict
from moe_surgery.spec import MoESpec

F64 = torch.float64
_UNIT, _SCALED = 64, 16


@dataclass(frozen=True, eq=False)
class Parts:
    """What an old block was seen to do with T tokens: its ``output`` [T, H] and the parts of it, not scaled yet.

    ``routed`` [T, H] is the routed experts' weighted sum, ``shared`` [T, H] the shared expert's output before its gate,
    ``gate`` [T, 1] the gate's logit, None where nothing gates it. All are sums over the ranks.
    """

    output: Tensor
    routed: Tensor
    shared: Tensor
    gate: Tensor | None


class Observed(Protocol):
    """An old block, asked about tokens ``[..., H]``. Raises :class:`Misconduct` if it didn't do what was read.

    ``shaken``: with every input of the shared expert's last matrix off by about one rounding.
    """

    def __call__(self, x: Tensor, *, shaken: bool) -> Parts: ...


def shake(x: Tensor) -> Tensor:
    """``x`` with every element off by about one rounding of its dtype, this way or that; the same at every call."""
    generator = torch.Generator("cpu").manual_seed(x.shape[-1])
    signs = torch.randint(0, 2, x.shape, generator=generator, device="cpu").to(x.device) * 2 - 1
    return (x.float() * (1 + signs * (torch.finfo(x.dtype).eps / 2))).to(x.dtype)


@dataclass(frozen=True, eq=False)
class _Answers:
    """What all calls together came to: R rows, one for each token of each call; ``where`` is the call of each row."""

    truth: Truth
    old: Tensor
    new: Tensor
    noise: list[float]
    floor: float
    slack: float
    twins: tuple[Twin, ...]
    where: tuple[str, ...]

    def worst(self, y: Tensor) -> tuple[list[float], list[str]]:
        """The greatest distance of ``y`` [R, H] in each family, and the call it was seen on."""
        everyone = torch.arange(len(y), device=y.device)
        distance = self.truth.distance_from(y, everyone)
        places = []
        for family in range(len(FAMILIES)):
            mine = distance.where(self.truth.family == family, -1.0)
            places.append(self.where[int(mine.argmax())])
        return self.truth.worst(distance, everyone).tolist(), places


def make_tokens(hidden: int, dtype: torch.dtype, device: torch.device, seed: int) -> Probes:
    """Random tokens of unit, small and large scale, and the zero token; the same for a seed on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    counts = {UNIT: _UNIT, SMALL: _SCALED, LARGE: _SCALED, ZERO: 1}
    x, family = [], []
    for number, count in counts.items():
        drawn = torch.randn(count, hidden, generator=generator, dtype=F64, device="cpu")
        x.append(unit(drawn) * SCALES[number])
        family.append(torch.full((count,), number, device="cpu"))
    return Probes(torch.cat(x).to(dtype).to(device), torch.cat(family).to(device))


def prove_combination(
    old: Observed,
    new: Block,
    spec: MoESpec,
    probes: Probes,
    *,
    inside: float = 1.0,
    ranks: int = 1,
    margin: float = 5.0,
    sizes: Iterable[int] = (),
) -> Verdict:
    """Judge ``new`` as a replacement of the block that ``old`` observes, both over the same experts.

    ``inside`` is the scale that the routed experts' observed output has in it already. Where ``ranks`` share the work,
    partial sums that are put together wrongly are among the mutants. ``sizes`` are further numbers of tokens to ask
    about. A block that raises fails the proof.
    """
    assert spec.shared is not None
    with torch.no_grad(), torch.autocast(probes.x.device.type, enabled=False):
        try:
            found = _ask(old, new, spec, probes, inside, ranks, sizes)
        except Misconduct as misconduct:
            return Verdict.of_nothing(
                f"the block {misconduct}", tokens=len(probes.x), powerless=False, reference="parts"
            )
        if isinstance(found, str):
            return Verdict.of_nothing(found, tokens=len(probes.x), reference="parts")
        return _judge(found, margin, len(probes.x))


def _ask(
    old: Observed, new: Block, spec: MoESpec, probes: Probes, inside: float, ranks: int, sizes: Iterable[int]
) -> _Answers | str:
    combine = _Combination(spec, inside, ranks)
    rows: dict[str, list[Tensor]] = {}
    wrong: dict[str, list[Tensor]] = {}
    places: dict[str, list[Tensor]] = {}
    where: list[str] = []
    for call in calls(probes, new=True, empty=False, sizes=sizes):
        parts, again = old(call.x.clone(), shaken=False), old(call.x.clone(), shaken=True)
        y = ask(new, call)
        finite = parts.output.isfinite().all(-1)
        if not bool(finite.any()):
            return f"the old block's output is not finite on {call.name}"
        mine = {
            "truth": combine.exactly(parts),
            "again": combine.exactly(again),
            "rounded": combine.rounded(parts).to(F64),
            "old": parts.output.to(F64),
            "new": y.to(F64),
            "family": probes.family[call.tokens],
        }
        begin = len(where)
        for name, value in mine.items():
            rows.setdefault(name, []).append(value[finite])
        where += [call.name] * int(finite.sum())
        if len(call.tokens.unique()) > 1:  # of one token there is no other
            at = torch.arange(begin, len(where), device=y.device)
            for name, value in combine.wrongly(parts):
                wrong.setdefault(name, []).append(value[finite])
                places.setdefault(name, []).append(at)
    all_rows = {name: torch.cat(values) for name, values in rows.items()}
    everyone = torch.arange(len(where), device=probes.x.device)
    truth = Truth(all_rows["truth"], everyone, all_rows["family"])
    floor = torch.finfo(probes.x.dtype).eps / 2
    noise = truth.worst(truth.distance_from(all_rows["rounded"], everyone), everyone)
    noise = noise.maximum(truth.worst(truth.distance_from(all_rows["again"], everyone), everyone))
    return _Answers(
        truth=truth,
        old=all_rows["old"],
        new=all_rows["new"],
        noise=noise.clamp_min(floor).tolist(),
        floor=floor,
        slack=SLACK * luck(spec.hidden),
        twins=tuple(Twin(name, torch.cat(values), torch.cat(places[name])) for name, values in wrong.items()),
        where=tuple(where),
    )


@dataclass(frozen=True)
class _Combination:
    """How the spec puts the parts together, how plain torch does in the block's dtype, and how it may go wrong."""

    spec: MoESpec
    inside: float
    ranks: int

    def exactly(self, parts: Parts) -> Tensor:
        return self._routed(parts) + self._shared(parts)

    def rounded(self, parts: Parts) -> Tensor:
        """The same in the dtype of the parts, rounded after every step."""
        assert self.spec.shared is not None
        shared = parts.shared if parts.gate is None else torch.sigmoid(parts.gate) * parts.shared
        routed = parts.routed * (self.spec.router.scale / self.inside)
        return routed.to(parts.output.dtype) + (shared * self.spec.shared.scale).to(parts.output.dtype)

    def _routed(self, parts: Parts) -> Tensor:
        return parts.routed.to(F64) * (self.spec.router.scale / self.inside)

    def _shared(self, parts: Parts) -> Tensor:
        ungated = self._ungated(parts)
        return ungated if parts.gate is None else parts.gate.to(F64).sigmoid() * ungated

    def _ungated(self, parts: Parts) -> Tensor:
        assert self.spec.shared is not None
        return parts.shared.to(F64) * self.spec.shared.scale

    def wrongly(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """The mutants [T, H], by name."""
        assert self.spec.shared is not None
        r, s, ranks = self._routed(parts), self._shared(parts), self.ranks
        scale, shared_scale = self.spec.router.scale, self.spec.shared.scale
        yield "shared expert dropped", r
        yield "shared expert doubled", r + 2 * s
        yield "half of the shared expert", r + s / 2
        yield "shared expert subtracted", r - s
        yield "routed experts dropped", s
        yield "routed experts doubled", 2 * r + s
        yield "shared expert in place of the routed ones", 2 * s
        yield "routed experts in place of the shared one", 2 * r
        yield "tokens shifted by one", (r + s).roll(1, 0)
        yield "shared expert of another token", r + s.roll(1, 0)
        yield "routed experts of another token", r.roll(1, 0) + s
        if parts.gate is not None:
            gate, ungated = parts.gate.to(F64), self._ungated(parts)
            yield "shared expert ungated", r + ungated
            yield "gate of another token", r + gate.roll(1, 0).sigmoid() * ungated
            yield "gate without its sigmoid", r + gate * ungated
            yield "gate on the routed experts too", gate.sigmoid() * r + s
        if scale != 1.0:
            yield "routed scale dropped", r / scale + s
            yield "routed scale on the shared expert too", r + scale * s
        if shared_scale != 1.0:
            yield "shared scale dropped", r + s / shared_scale
        if ranks > 1:
            yield "reduced twice", ranks * (r + s)
            yield "shared expert reduced twice", r + ranks * s
            yield "routed experts reduced twice", ranks * r + s


def _judge(found: _Answers, margin: float, tokens: int) -> Verdict:
    reading, read_at = found.worst(found.old)
    errors, built_at = found.worst(found.new)
    faults = beyond_noise("the old block is not what was read", reading, read_at, found)
    faults += beyond_noise("the new block is not what the spec says", errors, built_at, found)
    mutants = sorted(measure(found.twins, found, errors, margin), key=lambda m: m[0].margin)
    wrong = bool(faults)
    faults = faults or power_faults(mutants, found, margin)
    counts = torch.bincount(found.truth.family, minlength=len(FAMILIES)).tolist()
    each = zip(FAMILIES, counts, reading, errors, found.noise, strict=True)
    nearest = mutants[0][0]
    told = (
        f"new block {errors[UNIT]:.2g} from the old one's own parts put together in float64, old {reading[UNIT]:.2g} "
        f"(noise {found.noise[UNIT]:.2g}, {tokens} tokens); nearest of {len(mutants)} mutants: {nearest.name}, "
        f"{nearest.distance:.2g}, {nearest.margin:.3g} × the error ({margin:g} needed)"
    )
    return Verdict(
        passed=not faults,
        reason="; ".join(faults) or told,
        reading_error=reading[UNIT],
        build_error=errors[UNIT],
        noise=found.noise[UNIT],
        margin=nearest.margin,
        mutants=tuple(mutant for mutant, _ in mutants),
        tokens=tokens,
        near_ties=0,
        routing_flips=0,
        families=tuple(Family(*numbers) for numbers in each),
        powerless=bool(faults) and not wrong,
        bound=found.slack * found.noise[UNIT],
        reference="parts",
    )
