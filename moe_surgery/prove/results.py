"""The proof of what a block returns beside its output, and of how it is called.

The output is judged as that of any block. The other results are functions of the router alone: each is held against its
own truth in float64, on tokens whose choice of experts no rounding can change, and wrong twins must be told from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.answers import Replayed, Result, Structure, output_of
from moe_surgery.calling import Calling
from moe_surgery.companion import twins
from moe_surgery.prove.apart import SLACK, attribute, differences, form, leaves, unsteady
from moe_surgery.prove.asking import FEWEST
from moe_surgery.prove.probe import UNIT, Probes, make_probes
from moe_surgery.prove.proof import prove
from moe_surgery.prove.verdict import Verdict
from moe_surgery.read.record.state import unwritten
from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import Convention, weights_of, without_renormalising
from moe_surgery.weights.tensors import BlockTensors

_NOTHING = 1e-9
UNSURE = "every probe is within the router's noise, so that nothing is known of its results"
UNSTEADY = "asked the same again, it answers something else"
UNCHANGED = "no probe changes a buffer that it writes to, so that nothing is known of what it holds"


def prove_block(
    old: nn.Module,
    new: nn.Module,
    spec: MoESpec,
    tensors: BlockTensors,
    convention: Convention,
    *,
    seed: int = 0,
    margin: float = 5.0,
    probes: Probes | None = None,
) -> Verdict:
    """:func:`~moe_surgery.prove.proof.prove` of blocks that are called, and answer, as ``convention`` says."""
    calling, results = convention.calling, convention.results
    asked = [_asked(block, calling, results) for block in (old, new)]
    if any(companion.masks for companion in calling.companions):
        probes = _with_twins(probes or make_probes(spec, tensors.router, seed, tensors))
    verdict = prove(asked[0], asked[1], spec, tensors, seed=seed, margin=margin, probes=probes)
    if verdict.passed and (results is not None or convention.written or convention.state):
        with torch.no_grad():
            fault = next(_faults(old, new, spec, tensors, convention, seed, margin), None)
        if fault is not None:
            verdict = replace(verdict, passed=False, reason=fault, powerless=fault in (UNSURE, UNCHANGED))
    if not (verdict.passed or verdict.powerless) and _unsteady(old, spec, tensors, convention):
        return replace(verdict, reason=UNSTEADY, powerless=True)
    return verdict


def _unsteady(block: nn.Module, spec: MoESpec, tensors: BlockTensors, convention: Convention) -> bool:
    """Whether a block answers otherwise when it is asked the same again; one that answers nothing doesn't."""
    x = torch.randn(FEWEST, spec.hidden, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = x.to(tensors.w13.device, tensors.router.dtype)
    with torch.no_grad(), suppress(Exception):
        if spec.at == "experts":
            numbers = torch.arange(len(x) * min(2, spec.experts.acting), device=x.device) % spec.experts.acting
            ids = numbers.view(len(x), -1)
            return unsteady(block, convention, {"hidden_states": x, "ids": ids, "weights": x.new_ones(ids.shape)})
        return unsteady(block, convention, {"hidden_states": _batches(block, x, convention.calling)[-1]})
    return False


def _with_twins(probes: Probes) -> Probes:
    """Each token once masked and once not: an expert all of whose tokens are masked shows nothing."""
    return Probes(torch.cat([probes.x, twins(probes.x)]), probes.family.repeat(2))


def _asked(block: nn.Module, calling: Calling, results: Structure | None) -> Callable[..., Any]:
    roles = ("hidden_states", "ids", "weights")

    def ask(*tensors: Tensor) -> Any:
        given = dict(zip(roles, tensors, strict=False))
        y = calling.combined(output_of(results, block(*calling.placed(given))), given)
        flat = (results is not None or calling.form is not None) and y.numel() == tensors[0].numel()
        return y.view(tensors[0].shape) if flat else y

    return ask


def _faults(
    old: nn.Module,
    new: nn.Module,
    spec: MoESpec,
    tensors: BlockTensors,
    convention: Convention,
    seed: int,
    margin: float,
) -> Iterator[str]:
    """What is wrong with either block's results."""
    probes = make_probes(spec, tensors.router, seed, tensors)
    x = probes.x[probes.of(UNIT)]
    x = x[: len(x) // 2 * 2]
    wanted, exact, rounded, sure = convention.results, {}, {}, torch.ones(len(x), dtype=torch.bool, device=x.device)
    if wanted is not None and any(isinstance(leaf, Result) and leaf.value != "output" for leaf in wanted.leaves()):
        exact, rounded = convention.routed(x, torch.float64), convention.routed(x)
        sure = _sure(spec, exact, rounded)
    if not bool(sure.any()):
        yield UNSURE
    most = torch.finfo(x.dtype).eps * spec.hidden**0.5
    batches = _batches(old, x, convention.calling)
    if convention.state:
        yield from _otherwise_changed(old, new, convention, (*batches, x[None, :2]) if len(batches) > 1 else (x, x[:2]))
    for batch in batches:
        answers, wrote = [], []
        for block in (old, new):
            with unwritten(old):  # an object that both write to must be written to by each
                answers.append(block(*convention.calling.placed({"hidden_states": batch})))
                wrote.append([attribute(block, path, name) for (path, name), _ in convention.written])
        if form(answers[0]) != form(answers[1]):
            yield f"the new block returns {form(answers[1])}, the old one {form(answers[0])}"
            return
        for ((path, name), _), *values in zip(convention.written, *wrote, strict=True):
            yield from differences(f"{path}.{name}".lstrip("."), *values)
        found = [leaves(answer) for answer in answers]
        for number, leaf in enumerate(wanted.leaves() if wanted is not None else ()):
            if isinstance(leaf, Replayed):
                yield from differences(f"result {leaf.where}", *(values[number] for values in found))
            elif not isinstance(leaf, Result):
                if any(not _equal(values[number], found[0][number]) for values in found):
                    yield f"the new block returns {found[1][number]} where the old one returns {found[0][number]}"
            elif leaf.value != "output":
                given = [values[number].reshape(len(x), -1) for values in found]
                yield from _unlike(leaf, given, exact, rounded, sure, margin, most)


def _otherwise_changed(
    old: nn.Module, new: nn.Module, convention: Convention, batches: tuple[Tensor, ...]
) -> Iterator[str]:
    """How the buffers that calls change differ between two blocks after several calls that began with the same."""
    names = [name for name, _ in convention.state]
    told = set()
    for begun in (torch.zeros_like, _counted):
        after: list[dict[str, Tensor]] = []
        for block in (old, new):
            for name in names:
                block.get_buffer(name).copy_(begun(block.get_buffer(name)))
            for batch in batches:
                block(*convention.calling.placed({"hidden_states": batch}))
            after.append({name: block.get_buffer(name).clone() for name in names})
        for name in names:
            yield from differences(f"buffer {name}", after[0][name], after[1][name])
        told |= {name for name in names if not torch.equal(after[0][name], begun(after[0][name]))}
    if told != set(names):
        yield UNCHANGED


def _counted(like: Tensor) -> Tensor:
    """Numbers of which no two that stand together are the same."""
    places = torch.arange(like.numel(), device=like.device).view(like.shape)
    return (places % (2 if like.dtype is torch.bool else 5)).to(like.dtype) + torch.zeros_like(like)


def _batches(block: nn.Module, x: Tensor, calling: Calling) -> tuple[Tensor, ...]:
    """Tokens [T, H] in one row and in two; as they are where the block takes nothing else."""
    try:
        block(*calling.placed({"hidden_states": x[None]}))
    except Exception:  # whatever its code raises at a batch
        return (x,)
    return x[None], x.view(2, -1, x.shape[-1])


def _unlike(
    leaf: Result,
    given: list[Tensor],
    exact: dict[str, Tensor],
    rounded: dict[str, Tensor],
    sure: Tensor,
    margin: float,
    most: float,
) -> Iterator[str]:
    truth = _value(leaf, exact)[sure].double()
    dtype = given[0].dtype
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    # What is measured is no more than what products of that length may be off by, or a wrong formula would hide in it.
    noise = min(_distance(_value(leaf, rounded)[sure].double(), truth), most)
    bound = SLACK * max(noise, eps)
    for who, values in zip(("old", "new"), given, strict=True):
        if not (error := _distance(values[sure].double(), truth)) <= bound:
            yield f"the {who} block's {leaf.value} are {error:.2g} from what they should be; {bound:.2g} are allowed"
    for name, wrong in _twins(leaf, exact):
        apart = _distance(wrong[sure].double(), truth)
        if _NOTHING < apart < margin * bound:
            yield f"the check has no power here: {name} differ by {apart:.2g} from its {leaf.value}"


def _twins(leaf: Result, exact: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Wrong results that are like the right one."""
    value = _value(leaf, exact)
    yield "those of another token", value.roll(1, 0)
    yield "those of the next expert", value.roll(1, -1)
    if leaf.value in ("logits", "scores"):
        yield "logits for scores", exact["scores" if leaf.value == "logits" else "logits"]
    if leaf.weighting is not None:
        yield "weights normalised otherwise", weights_of(without_renormalising(leaf), exact)


def _value(leaf: Result, values: dict[str, Tensor]) -> Tensor:
    return values[leaf.value] if leaf.weighting is None else weights_of(leaf, values)


def _sure(spec: MoESpec, exact: dict[str, Tensor], rounded: dict[str, Tensor]) -> Tensor:
    """Tokens [T] whose best k + 1 experts are so far apart that rounding can't exchange any two of them."""
    by = [values["ranked"].double() for values in (exact, rounded)]
    finite = by[0].isfinite() & by[1].isfinite()
    noise = (by[0] - by[1]).where(finite, 0.0).abs().amax(-1)
    best = by[0].topk(min(spec.router.top_k + 1, by[0].shape[-1]), -1).values
    apart = (best[:, :-1] - best[:, 1:]).amin(-1) if best.shape[-1] > 1 else torch.ones_like(best[:, 0])
    return apart > SLACK * noise


def _distance(values: Tensor, truth: Tensor) -> float:
    """The greatest relative distance of a token's values from the truth."""
    if not bool(values.isfinite().all()):
        return float("inf")
    return float(((values - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-300)).max())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
