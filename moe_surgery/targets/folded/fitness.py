"""What the folded kernels compute: all of a block in one operator, its experts alone, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.base import Context
from moe_surgery.targets.shared_as_experts import slices, unfoldable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
MOST_EXPERTS = 1024
MOST_PAIRS = 64
NEEDS_CAPABILITY = (8, 0)

_RANKED = {"ranks", "ranked_dtype", "scores_dtype"}
_ROUTED_HERE = {"num_experts", "top_k", "scoring", "renormalize", "scale", "logits_dtype", "weights_dtype"} | _RANKED
# What is known of a spec. Any other field must have its default: it would be computed as if it had.
_KNOWN = {
    "": {"hidden", "router", "experts", "shared", "at", "output_bias", "results"},
    "router": _ROUTED_HERE
    | {"bias", "soft_cap", "correction_bias", "groups", "epsilon", "floor", "norm", "cap_dtype"}
    | {"wide_matrix"},
    "experts": {"num_experts", "width", "activation", "gated", "limit", "limit_after", "alpha", "offset"}
    | {"biases", "weights_on", "identities", "empty"},
    "shared": {"width", "activation", "gate", "scale", "gated", "limit", "limit_after", "alpha", "offset"},
}
# The same of what one operator computes, its own choice of experts included.
_WHOLE = {
    "": {"hidden", "router", "experts", "shared", "results"},
    "router": _ROUTED_HERE,
    "experts": {"num_experts", "width", "activation"},
    "shared": {"width", "activation", "gate", "scale"},
}


def objections(spec: MoESpec, context: Context) -> Iterator[str]:
    """Why the kernels can't compute even the routed experts of ``spec``, cheapest first."""
    router, experts = spec.router, spec.experts
    if context.device != "cuda":
        yield f"the folded kernels run on cuda and cpu; this model is on {context.device}"
    if context.dtype not in DTYPES:
        yield f"dtype {context.dtype} is none of {', '.join(DTYPES)}"
    yield from _unknown_fields(spec, _KNOWN)
    if router.own and spec.at == "block":
        yield "its router is the model's own, which only its experts alone can be behind"
    if experts.activation not in ACTIVATIONS:
        yield f"expert activation {experts.activation} is none of the folded kernels': {', '.join(ACTIVATIONS)}"
    if experts.limit is not None and experts.limit <= 0:
        yield f"a clamp at {experts.limit:g}, which is not above zero"
    if experts.identities and experts.weights_on == "input":
        yield "experts that return their input, weighted on the input"
    if router.num_experts != experts.total:
        yield f"the router scores {router.num_experts} experts, there are {experts.total}"
    if not 1 <= router.top_k <= experts.total:
        yield f"top-{router.top_k} of {experts.total} experts"
    if experts.num_experts > MOST_EXPERTS:
        yield f"{experts.num_experts} experts are more than the {MOST_EXPERTS} that the folded kernels take"
    if router.top_k > MOST_PAIRS:
        yield f"{router.top_k} experts for each token are more than {MOST_PAIRS}"
    if context.live and context.device == "cuda":
        yield from missing()


def outside(spec: MoESpec, dtype: str) -> Iterator[str]:
    """Why not all of ``spec`` is computed in one operator, where its routed experts are; the rest is torch's then."""
    if spec.at == "experts":
        return
    router = spec.router
    if router.scoring not in ("softmax", "sigmoid"):
        yield f"routing {router.scoring} is none that the folded kernels compute: softmax, sigmoid"
    yield from _unknown_fields(spec, _WHOLE)
    yield from _ranked_coarser(router.within(dtype))
    yield from beside(spec)


def in_torch(spec: MoESpec, dtype: str) -> Iterator[str]:
    """What of ``spec`` is computed in plain torch around the kernels, and why."""
    if spec.at == "experts":
        return
    yield from routed_in_torch(spec, dtype)
    yield from beside(spec)
    if spec.experts.identities:
        yield "experts that return their input"
    if spec.output_bias:
        yield "an output bias"


def routed_in_torch(spec: MoESpec, dtype: str) -> Iterator[str]:
    """Why the router is computed in torch: what of its formula the router's kernel hasn't, in a block of ``dtype``."""
    router = spec.router.within(dtype)
    if router.wide_matrix and spec.shared is not None and spec.shared.gate is not None:
        yield "the router's matrix is in float32, the shared expert's gate isn't"
    if router.soft_cap is not None and router.cap_dtype == "native":
        yield "router.cap_dtype = native is nothing that the folded kernels compute"
    if router.norm not in (1.0, 2.0):
        yield f"router.norm = {router.norm:g} is nothing that the folded kernels compute"
    groups = router.groups
    if groups is not None and (router.num_experts % groups.count or groups.outside not in (0.0, -math.inf)):
        yield f"router.groups = {groups} is nothing that the folded kernels compute"
    if groups is not None and groups.score == "top2" and router.num_experts < 2 * groups.count:
        yield "groups of one expert have no second best"
    yield from _ranked_coarser(router)
    if router.ranks == "logits" and router.ranked_dtype == "native" and (router.correction_bias or router.soft_cap):
        yield "router.ranked_dtype = native is nothing that the folded kernels compute"


def beside(spec: MoESpec) -> Iterator[str]:
    """Why the shared expert can't be among the routed ones."""
    yield from unfoldable(spec)
    if spec.router.top_k + slices(spec) > MOST_PAIRS:
        yield f"{spec.router.top_k} + {slices(spec)} experts for each token are more than {MOST_PAIRS}"


def _ranked_coarser(router: RouterSpec) -> Iterator[str]:
    """Fields by which a block ranks what is rounded more than the kernels round it: float32 scores, or its logits.

    Scores that aren't ranked are weights, which the kernels keep in float32 whatever the spec says.
    """
    if router.ranks == "scores":
        coarser = {"scores_dtype": router.scores_dtype, "ranked_dtype": router.ranked_dtype}
    else:
        coarser = {"ranked_dtype": router.ranked_dtype} if router.logits_dtype == "float32" else {}
    for name, dtype in coarser.items():
        if dtype == "native":
            yield f"router.{name} = native is nothing that the folded kernels compute"


def _unknown_fields(spec: MoESpec, known_fields: dict[str, set[str]]) -> Iterator[str]:
    """Fields of the spec that are none of ``known_fields`` and not at their defaults."""
    for part, known in known_fields.items():
        value: Any = getattr(spec, part) if part else spec
        if value is None:
            continue
        for field in fields(value):
            if field.name not in known and (field.default is MISSING or getattr(value, field.name) != field.default):
                name = f"{part}.{field.name}".lstrip(".")
                yield f"{name} = {getattr(value, field.name)} is nothing that the folded kernels compute"


@cache
def missing() -> tuple[str, ...]:
    """What this machine lacks."""
    if find_spec("triton") is None:
        return ("the folded kernels need Triton, which isn't installed",)
    if torch.version.cuda is None:
        return ("the folded kernels are for NVIDIA GPUs, and this torch isn't built for them",)
    capability = torch.cuda.get_device_capability()
    if capability < NEEDS_CAPABILITY:
        found, needed = (".".join(map(str, numbers)) for numbers in (capability, NEEDS_CAPABILITY))
        return (f"the folded kernels need compute capability {needed}, this GPU has {found}",)
    return ()
