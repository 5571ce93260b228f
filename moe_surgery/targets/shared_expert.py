"""The shared expert in plain torch."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.spec import MoESpec
from moe_surgery.targets.e4m3 import product
from moe_surgery.targets.formula import Mixer
from moe_surgery.weights.tensors import BlockScales


class SharedWeights(Protocol):
    """The matrices of a shared expert, as :class:`~moe_surgery.weights.tensors.BlockTensors` has them."""

    @property
    def shared_gate_proj(self) -> Tensor | None: ...

    @property
    def shared_up_proj(self) -> Tensor | None: ...

    @property
    def shared_down_proj(self) -> Tensor | None: ...

    @property
    def shared_gate(self) -> Tensor | None: ...

    @property
    def scales(self) -> BlockScales | None: ...


def shared_parts(
    tensors: SharedWeights, x: Tensor, mix: Mixer, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The shared expert's ungated output [T, H] and its gate's logit [T, 1], or None where nothing gates it."""
    gate, up, down = tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj
    assert gate is not None and down is not None
    work = dtype or x.dtype
    x = x.to(work)
    s = tensors.scales

    def stored(values: Tensor) -> Tensor:
        """As they lie in memory between two products, where they are rounded to e4m3 on their way to the next."""
        return values if s is None else values.to(s.dtype).to(torch.promote_types(work, torch.float32))

    scales = (s.shared_gate_proj, s.shared_up_proj, s.shared_down_proj) if s else (None, None, None)
    half = stored(product(x, gate, scales[0]))
    other = half if up is None else stored(product(x, up, scales[1]))
    out = product(stored(mix(half, other)), down, scales[2]).to(work)
    return out, None if tensors.shared_gate is None else F.linear(x, tensors.shared_gate.to(work))


def shared_output(spec: MoESpec, out: Tensor, gate: Tensor | None) -> Tensor:
    """What :func:`shared_parts` found, gated and scaled."""
    assert spec.shared is not None
    if gate is not None:
        out = gate.sigmoid() * out
    return out * spec.shared.scale if spec.shared.scale != 1.0 else out
