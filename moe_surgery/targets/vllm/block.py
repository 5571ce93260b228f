"""The block that takes the place of a model's own: vLLM's layer behind the interface the model expects."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.spec import MoESpec
from moe_surgery.targets.guarded import GuardedBlock, measure
from moe_surgery.weights.tensors import BlockTensors


class FusedMoEBlock(GuardedBlock):
    """A sparse-MoE block computed by vLLM's kernels.

    vLLM keeps the forward context in a module global: run one thread of a process at a time.
    """

    kernels = "vLLM's MoE layers"

    def __init__(self, spec: MoESpec, tensors: BlockTensors, fused: nn.Module, label: str) -> None:
        super().__init__(spec, tensors.router, label)
        self.fused = fused
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype; raises what :meth:`tokens` raises."""
        x = self.tokens(hidden_states)
        if self.spec.router.logits_dtype == "float32":
            logits = F.linear(x.float(), self.router_weight.float())
        else:
            logits = F.linear(x, self.router_weight)
        out: Tensor = self.fused(x, logits)
        return out.view(hidden_states.shape)

    def _own_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.router_weight, *self.fused.parameters())
