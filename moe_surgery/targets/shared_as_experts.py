"""Folding: a shared expert as further routed experts, which every token visits.

A gated MLP of width M·I is the sum of M gated MLPs of width I, since its down projection sums over the width. So a
shared expert of that width is M more experts that every token visits with the same weight. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def slices(spec: MoESpec) -> int:
    """How many routed experts the shared one is; 0 if there is none."""
    return 0 if spec.shared is None else spec.shared.width // spec.experts.width


def unfoldable(spec: MoESpec) -> Iterator[str]:
    """Why the shared expert of ``spec`` can't be cut into routed ones."""
    experts, shared = spec.experts, spec.shared
    if shared is None:
        return
    over = shared.width % experts.width
    if over:
        yield (
            f"shared width {shared.width} is not a multiple of the expert width {experts.width} "
            f"({shared.width // experts.width} × {experts.width} leaves {over})"
        )
    if shared.mix != experts.mix:
        yield f"the shared expert's activation is {shared.mix}, the routed experts' {experts.mix}"


def cut(tensors: BlockTensors, spec: MoESpec) -> tuple[Tensor, Tensor]:
    """The shared expert as w13 [M, 2I, H] ([M, I, H] without an up projection) and w2 [M, H, I], laid out anew."""
    gate, up, down = tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj
    assert gate is not None and down is not None
    count, width = slices(spec), spec.experts.width
    rows = [part.reshape(count, width, spec.hidden) for part in (gate, up) if part is not None]
    return torch.cat(rows, 1), down.unflatten(1, (count, width)).transpose(0, 1).contiguous()


def router_rows(tensors: BlockTensors) -> Tensor:
    """The router's weight [E, H], or [E + 1, H] with the shared expert's gate behind it."""
    gate = tensors.shared_gate
    return tensors.router if gate is None else torch.cat([tensors.router, gate])
