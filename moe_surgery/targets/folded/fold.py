"""Folding a shared expert into the routed ones.

A gated MLP of width M·I is the sum of M gated MLPs of width I, since its down projection sums over the width. So a
shared expert of that width is M more experts that every token visits with the same weight. Nothing is approximated,
and nothing is stored twice: routed experts are taken as they lie, the shared expert's rows are laid out anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.errors import SurgeryError
from moe_surgery.kernels.terms import Terms, Weights
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def terms_of(spec: MoESpec) -> Terms:
    """The spec in the kernels' numbers; its shared width must be a multiple of the expert width."""
    router, experts, shared = spec.router, spec.experts, spec.shared
    if shared is not None and shared.width % experts.width:
        raise ValueError(f"shared width {shared.width} is not a multiple of the expert width {experts.width}")
    return Terms(
        experts=experts.num_experts,
        top_k=router.top_k,
        slices=shared.width // experts.width if shared is not None else 0,
        hidden=spec.hidden,
        width=experts.width,
        activation=experts.activation,
        sigmoid=router.scoring == "sigmoid",
        renormalize=router.renormalize,
        scale=float(router.scale),
        shared_scale=float(shared.scale) if shared is not None else 1.0,
        gated=shared is not None and shared.gate is not None,
        native=router.logits_dtype == "native",
    )


def fold(tensors: BlockTensors, terms: Terms) -> Weights:
    """Folded weights: ``w13`` and ``w2`` by reference, the router copied with the gate's row behind it."""
    router = tensors.router
    if terms.gated:
        assert tensors.shared_gate is not None
        router = torch.cat([router, tensors.shared_gate])
    shared13, shared2 = _slices(tensors, terms) if terms.slices else (None, None)
    return Weights(router.contiguous(), tensors.w13.contiguous(), tensors.w2.contiguous(), shared13, shared2)


def _slices(tensors: BlockTensors, terms: Terms) -> tuple[Tensor, Tensor]:
    """The shared expert as [M, 2I, H] and [M, H, I]."""
    gate, up, down = tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj
    assert gate is not None and up is not None and down is not None
    shape = (terms.slices, terms.width, terms.hidden)
    columns = down.unflatten(1, (terms.slices, terms.width)).transpose(0, 1)
    return torch.cat([gate.reshape(shape), up.reshape(shape)], 1), columns.contiguous()


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
