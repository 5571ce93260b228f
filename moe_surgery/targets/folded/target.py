"""The target itself: what it takes, and how it builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch

from moe_surgery.errors import UnsupportedError
from moe_surgery.spec import MoESpec, RouterSpec
from moe_surgery.targets.base import Context, Refusal, SwappedBlock, Target
from moe_surgery.targets.shared_as_experts import slices, unfoldable
from moe_surgery.weights.tensors import BlockTensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MOST_EXPERTS = 1024
MOST_PAIRS = 64
NEEDS_CAPABILITY = (8, 0)

# What the kernels know of a spec. Any other field must have its default: it would be computed as if it had.
_KNOWN = {
    "": {"hidden", "router", "experts", "shared", "results"},
    "router": {"num_experts", "top_k", "scoring", "renormalize", "scale", "logits_dtype", "weights_dtype"}
    | {"ranks", "ranked_dtype", "scores_dtype"},
    "experts": {"num_experts", "width", "activation"},
    "shared": {"width", "activation", "gate", "scale"},
}


class FoldedTarget:
    """The block with its shared expert cut into experts of the routed width.

    On CUDA in this library's Triton kernels, where routing weights are kept in float32, whatever the spec says: that is
    nearer to its formula. On CPU in the routed layer of the installed engine.
    """

    name = "folded"
    label = "folded"

    @cached_property
    def layer(self) -> Target:
        """The same on CPU."""
        from moe_surgery.targets.vllm.folded_target import FoldedLayerTarget

        return FoldedLayerTarget()

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """None if the device's kernels compute ``spec``; no weights are touched."""
        if context.device == "cpu":
            return self.layer.accepts(spec, context)
        reason = next(_objections(spec, context), None)
        return None if reason is None else Refusal(reason)

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> SwappedBlock:
        """See :meth:`moe_surgery.targets.base.Target.build`. On CUDA routed experts are used as they lie in memory."""
        context = Context(tensors.w13.device.type, str(tensors.w13.dtype).removeprefix("torch."))
        if context.device == "cpu":
            return self.layer.build(spec, tensors, prefix=prefix)
        refusal = self.accepts(spec, context)
        if refusal is not None:
            raise UnsupportedError(f"{prefix}: {refusal.reason}")
        # Only now, since these need Triton.
        from moe_surgery.targets.folded.block import FoldedMoEBlock
        from moe_surgery.targets.folded.fold import check_tensors, fold, terms_of

        terms = terms_of(spec)
        check_tensors(tensors, terms, prefix)
        return FoldedMoEBlock(spec, tensors, fold(tensors, spec), terms)


def _objections(spec: MoESpec, context: Context) -> Iterator[str]:
    """Why the kernels can't take ``spec``, cheapest first."""
    router, experts = spec.router, spec.experts
    if context.device != "cuda":
        yield f"the folded kernels run on cuda and cpu; this model is on {context.device}"
    if context.dtype not in DTYPES:
        yield f"dtype {context.dtype} is none of {', '.join(DTYPES)}"
    yield from _unknown_fields(spec)
    yield from _ranked_coarser(router.within(context.dtype))
    if router.scoring not in ("softmax", "sigmoid"):
        yield f"routing {router.scoring} is none that the folded kernels compute: softmax, sigmoid"
    if experts.activation not in ACTIVATIONS:
        yield f"expert activation {experts.activation} is none of the folded kernels': {', '.join(ACTIVATIONS)}"
    if router.num_experts != experts.num_experts:
        yield f"the router scores {router.num_experts} experts, there are {experts.num_experts}"
    if not 1 <= router.top_k <= experts.num_experts:
        yield f"top-{router.top_k} of {experts.num_experts} experts"
    if experts.num_experts > MOST_EXPERTS:
        yield f"{experts.num_experts} experts are more than the {MOST_EXPERTS} that the folded kernels rank"
    yield from unfoldable(spec)
    if router.top_k + slices(spec) > MOST_PAIRS:
        yield f"{router.top_k} + {slices(spec)} experts for each token are more than {MOST_PAIRS}"
    if context.live and context.device == "cuda":
        yield from _missing()


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


def _unknown_fields(spec: MoESpec) -> Iterator[str]:
    """Fields of the spec that the kernels know nothing of and that are not at their defaults."""
    for part, known in _KNOWN.items():
        value: Any = getattr(spec, part) if part else spec
        if value is None:
            continue
        for field in fields(value):
            if field.name not in known and (field.default is MISSING or getattr(value, field.name) != field.default):
                name = f"{part}.{field.name}".lstrip(".")
                yield f"{name} = {getattr(value, field.name)} is nothing that the folded kernels compute"


@cache
def _missing() -> tuple[str, ...]:
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
