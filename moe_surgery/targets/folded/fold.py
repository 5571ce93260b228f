"""What the folded kernels are given: the spec in their numbers, and the weights as they take them.

Nothing is stored twice: routed experts are taken as they lie, the shared expert's rows are laid out anew.
"""

from __future__ import annotations

from torch import Tensor

from moe_surgery.errors import SurgeryError
from moe_surgery.kernels.arguments import Terms, Weights
from moe_surgery.spec import MoESpec
from moe_surgery.targets.shared_as_experts import cut, router_rows, slices, unfoldable
from moe_surgery.weights.tensors import BlockTensors


def terms_of(spec: MoESpec) -> Terms:
    """The spec in the kernels' numbers; its shared width must be a multiple of the expert width."""
    router, experts, shared = spec.router, spec.experts, spec.shared
    for reason in unfoldable(spec):
        raise ValueError(reason)
    return Terms(
        experts=experts.num_experts,
        top_k=router.top_k,
        slices=slices(spec),
        hidden=spec.hidden,
        width=experts.width,
        activation=experts.activation,
        sigmoid=router.scoring == "sigmoid",
        renormalize=router.renormalize,
        scale=float(router.scale),
        shared_scale=float(shared.scale) if shared is not None else 1.0,
        gated=shared is not None and shared.gate is not None,
        native=router.logits_dtype == "native",
        by_sigmoid=router.scoring == "sigmoid" and router.ranks == "scores",
    )


def fold(tensors: BlockTensors, spec: MoESpec) -> Weights:
    """Folded weights: ``w13`` and ``w2`` by reference, the router copied if a gate's row is put behind it."""
    shared13, shared2 = cut(tensors, spec) if spec.shared is not None else (None, None)
    return Weights(
        router_rows(tensors).contiguous(), tensors.w13.contiguous(), tensors.w2.contiguous(), shared13, shared2
    )


def check_tensors(tensors: BlockTensors, terms: Terms, prefix: str) -> None:
    """Raise :class:`SurgeryError` if ``tensors`` aren't those of ``terms``, all in one dtype on one device."""
    experts, hidden, width, shared = terms.experts, terms.hidden, terms.width, terms.slices * terms.width
    wanted: dict[str, tuple[int, ...] | None] = {
        "router": (experts, hidden),
        "w13": (experts, 2 * width, hidden),
        "w2": (experts, hidden, width),
        "shared_gate_proj": (shared, hidden) if shared else None,
        "shared_up_proj": (shared, hidden) if shared else None,
        "shared_down_proj": (hidden, shared) if shared else None,
        "shared_gate": (1, hidden) if terms.gated else None,
    }
    for name, shape in wanted.items():
        tensor: Tensor | None = getattr(tensors, name)
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise SurgeryError(f"{prefix}: {name} has shape {found}, the spec wants {shape}")
        if tensor is not None and (tensor.dtype, tensor.device) != (tensors.w13.dtype, tensors.w13.device):
            raise SurgeryError(
                f"{prefix}: {name} is {tensor.dtype} on {tensor.device}, the experts are {tensors.w13.dtype} on "
                f"{tensors.w13.device}"
            )
