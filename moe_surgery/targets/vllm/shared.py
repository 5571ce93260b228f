"""The shared expert, as the module that vLLM's layer calls beside its routed experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.spec import SharedSpec
from moe_surgery.targets.formula import mixer
from moe_surgery.weights.tensors import BlockTensors


class SharedExpert(nn.Module):
    """One MLP, times its sigmoid gate and scale, over the given tensors by reference.

    The gate belongs in here: vLLM adds what this returns to the routed output as it is. The operations and their order
    are those of transformers, so the shared part of the output is the same to the bit.
    """

    def __init__(self, spec: SharedSpec, tensors: BlockTensors) -> None:
        super().__init__()
        self.spec, self.mix = spec, mixer(spec.mix)
        self.gate_proj = _frozen(tensors.shared_gate_proj)
        self.up_proj = _frozen(tensors.shared_up_proj)
        self.down_proj = _frozen(tensors.shared_down_proj)
        self.gate = _frozen(tensors.shared_gate)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        assert self.gate_proj is not None and self.down_proj is not None
        gate = F.linear(x, self.gate_proj)
        up = gate if self.up_proj is None else F.linear(x, self.up_proj)
        y = F.linear(self.mix(gate, up), self.down_proj)
        if self.gate is not None:
            y = torch.sigmoid(F.linear(x, self.gate)) * y
        return y * self.spec.scale if self.spec.scale != 1.0 else y


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
