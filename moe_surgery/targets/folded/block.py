"""The block that takes the place of a model's own, computed by this library's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_surgery.kernels.arguments import Terms, Weights
from moe_surgery.kernels.op import compute, folded_moe
from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import answering
from moe_surgery.targets.guarded import GuardedBlock, measure
from moe_surgery.weights.tensors import BlockTensors


class FoldedMoEBlock(GuardedBlock):
    """A sparse-MoE block whose shared expert is folded into the routed ones.

    A call launches three kernels for few tokens, five for more, and nothing else.
    """

    kernels = "this library's MoE kernels"

    def __init__(self, spec: MoESpec, tensors: BlockTensors, weights: Weights, terms: Terms) -> None:
        super().__init__(spec, weights.router, "folded, moe-surgery kernels")
        self.w13 = nn.Parameter(weights.w13, requires_grad=False)
        self.w2 = nn.Parameter(weights.w2, requires_grad=False)
        self.shared13 = _frozen(weights.shared13)
        self.shared2 = _frozen(weights.shared2)
        self.terms = terms
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    @answering
    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype; raises what :meth:`tokens` raises."""
        x = self.tokens(hidden_states)
        weights = Weights(self.router_weight, self.w13, self.w2, self.shared13, self.shared2)
        if torch.compiler.is_compiling():
            return folded_moe(x, weights, self.terms).view(hidden_states.shape)
        return compute(x, weights, self.terms).view(hidden_states.shape)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
