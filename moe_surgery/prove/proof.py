"""The proof: is the new block the old one, and would this check have noticed if it weren't?

``prove`` computes the reference from the spec and the weights alone, in float64, and measures three things against it
with one metric: the old block (was it *read* right?), the new block (was it *built* right?) and wrong twins (could
this check tell?). What an error may be is measured too: the same plain torch run in the block's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_surgery.prove.asking import EMPTY, STRIDED, Answers, Block, Misconduct, Refused, calls, exercise
from moe_surgery.prove.experts_alone import behind_a_router
from moe_surgery.prove.ground import Ground, listed, survey
from moe_surgery.prove.judging import FEWEST_MUTANTS as FEWEST_MUTANTS
from moe_surgery.prove.judging import beyond_noise, measure, power_faults
from moe_surgery.prove.limits import KERNELS, of_kernels
from moe_surgery.prove.probe import FAMILIES, UNIT, Probes
from moe_surgery.prove.verdict import Family, Verdict
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def prove(
    old: Block,
    new: Block,
    spec: MoESpec,
    tensors: BlockTensors,
    *,
    seed: int = 0,
    margin: float = 5.0,
    probes: Probes | None = None,
) -> Verdict:
    """Judge ``new`` as a replacement of ``old``.

    Both are called with inputs ``[B, S, H]``, ``new`` also with ``[T, H]``, in the tensors' dtype and on their device,
    without gradients. A block that raises fails the proof; the error doesn't escape. ``probes`` are those that
    :func:`~moe_surgery.prove.probe.make_probes` made of this block, where that was done before.
    """
    if spec.at == "experts":
        spec, tensors, (old, new) = behind_a_router(spec, tensors, seed, old, new)
    ground = survey(spec, tensors, seed, probes=probes)
    return Verdict.of_nothing(ground) if isinstance(ground, str) else _judge(ground, margin, old, new)


def prove_reading(old: Block, spec: MoESpec, tensors: BlockTensors, *, seed: int = 0, margin: float = 5.0) -> Verdict:
    """Judge the reading alone: does ``old`` compute ``spec``? The margin is then that of the old block."""
    if spec.at == "experts":
        spec, tensors, (old,) = behind_a_router(spec, tensors, seed, old)
    ground = survey(spec, tensors, seed)
    return Verdict.of_nothing(ground, new=False) if isinstance(ground, str) else _judge(ground, margin, old, None)


def prove_swapped(block: Block, ground: Ground | str, *, margin: float = 5.0, sizes: Sequence[int] = ()) -> Verdict:
    """Judge a block that was swapped in where the old one can't be asked any more: does it compute what it should?

    It is asked what an engine may ask, so never about no token: kernels of vLLM's can't be launched for none on a GPU.
    It is asked about as many tokens as ``sizes`` say too: those from which it computes in another way. It may be off as
    far as kernels may (:mod:`~moe_surgery.prove.limits`). ``ground`` is what
    :func:`~moe_surgery.prove.ground.survey` made of the weights, while they could still be read.
    """
    if isinstance(ground, str):
        return Verdict.of_nothing(ground, new=False)
    return _judge(of_kernels(ground), margin, block, None, "swapped", sizes)


def _judge(
    ground: Ground, margin: float, old: Block, new: Block | None, who: str = "old", sizes: Sequence[int] = ()
) -> Verdict:
    reading = _examine_old(old, ground, empty=who == "old", sizes=sizes)
    faults = _error_faults(who, reading, ground)
    # An old block that can't be called isn't wrong: nothing is known of it.
    silent = len(faults) if new is not None and isinstance(reading, Refused) else 0
    judged = reading
    if new is not None:
        # A right answer to an empty input is owed only where the old block gave one.
        excused = reading.refused & {EMPTY} if isinstance(reading, Answers) else frozenset({EMPTY})
        judged = _examine(new, ground, excused, new=True)
        faults += _error_faults("new", judged, ground)
    errors = judged.worst if isinstance(judged, Answers) else [0.0] * len(FAMILIES)
    mutants = sorted(measure(ground.twins, ground, errors, margin), key=lambda m: m[0].margin)
    # An expert that isn't reached would fail here again, as would a wrong block.
    wrong, faults = len(faults) > silent, _ground_faults(ground) + faults
    faults = faults or power_faults(mutants, ground, margin)
    verdict = Verdict(
        passed=not faults,
        reason="; ".join(faults),
        reading_error=_worst(reading)[UNIT],
        build_error=None if new is None else _worst(judged)[UNIT],
        noise=ground.noise[UNIT],
        margin=mutants[0][0].margin if isinstance(judged, Answers) else 0.0,
        mutants=tuple(mutant for mutant, _ in mutants),
        tokens=len(ground.probes.x),
        near_ties=ground.routing.near_ties,
        routing_flips=int(judged.flipped.sum()) if isinstance(judged, Answers) else 0,
        families=tuple(_families(ground, _worst(reading), None if new is None else _worst(judged))),
        left_out=ground.overflowed + ground.undecided,
        powerless=bool(faults) and not wrong,
        bound=ground.slack * ground.noise[UNIT],
    )
    return verdict if faults else replace(verdict, reason=_account(verdict, margin, who))


def _examine(
    block: Block,
    ground: Ground,
    excused: frozenset[str],
    *,
    new: bool = False,
    empty: bool = True,
    sizes: Sequence[int] = (),
) -> Answers | Misconduct:
    try:
        return exercise(block, calls(ground.probes, new=new, empty=empty, sizes=sizes), ground.truth, excused)
    except Misconduct as misconduct:
        return misconduct


def _examine_old(old: Block, ground: Ground, *, empty: bool, sizes: Sequence[int]) -> Answers | Misconduct:
    """Ask the old block, which takes ``[B, S, H]`` or, if it refuses that, only ``[T, H]``."""
    excused = frozenset({STRIDED, EMPTY})
    answers = _examine(old, ground, excused, empty=empty, sizes=sizes)
    if isinstance(answers, Refused):
        flat = _examine(
            lambda x: old(x.reshape(-1, x.shape[-1])).view(x.shape), ground, excused, empty=empty, sizes=sizes
        )
        return flat if isinstance(flat, Answers) else answers
    return answers


def _worst(answers: Answers | Misconduct) -> list[float]:
    return answers.worst if isinstance(answers, Answers) else [math.inf] * len(FAMILIES)


def _families(ground: Ground, reading: list[float], build: list[float] | None) -> list[Family]:
    tokens = torch.bincount(ground.probes.family, minlength=len(FAMILIES)).tolist()
    return [
        Family(name, tokens[number], reading[number], build[number] if build else None, ground.noise[number])
        for number, name in enumerate(FAMILIES)
    ]


def _ground_faults(ground: Ground) -> list[str]:
    """Why these weights don't let any block be proven."""
    if not ground.unvisited:
        return []
    fault = f"no probe is surely routed to {listed(ground.unvisited)}, so nothing is known of what it computes"
    if ground.overflowed:
        fault += f"; {ground.overflowed} probes were left out because their outputs aren't finite"
    return [fault]


def _error_faults(which: str, answers: Answers | Misconduct, ground: Ground) -> list[str]:
    """What is wrong with a block: its conduct, or its numbers in the family where they are worst for their noise."""
    if isinstance(answers, Misconduct):
        return [f"the {which} block {answers}"]
    what = "the old block is not what was read" if which == "old" else f"the {which} block is not what the spec says"
    return beyond_noise(what, answers.worst, answers.where, ground, KERNELS if which == "swapped" else 1.0)


def _account(verdict: Verdict, margin: float, who: str) -> str:
    """The sentence of a proof that holds."""
    nearest = verdict.nearest_mutant
    assert nearest is not None
    error = verdict.reading_error if verdict.build_error is None else verdict.build_error
    read = "" if verdict.build_error is None else f", old {verdict.reading_error:.2g}"
    ties = f"; {verdict.near_ties} near ties, {verdict.routing_flips} routed the other way" if verdict.near_ties else ""
    ties += f"; {verdict.left_out} probes say nothing in this dtype" if verdict.left_out else ""
    return (
        f"{who if verdict.build_error is None else 'new'} block {error:.2g} from the reference{read} "
        f"(noise {verdict.noise:.2g}, {verdict.tokens} tokens); nearest of {len(verdict.mutants)} mutants: "
        f"{nearest.name}, {nearest.distance:.2g}, {nearest.margin:.3g} × the error ({margin:g} needed){ties}"
    )
