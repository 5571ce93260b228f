"""The block that takes the place of a model's own, computed by this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_surgery.kernels.arguments import Weights
from moe_surgery.kernels.op import compute, folded_moe
from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import answering
from moe_surgery.targets.folded.fold import fold, terms_of
from moe_surgery.targets.guarded import GuardedBlock, measure
from moe_surgery.weights.tensors import BlockTensors


class FoldedMoEBlock(GuardedBlock):
    """A sparse-MoE block whose shared expert is folded into the routed ones.

    A call launches three kernels for few tokens, five for more, and nothing else.
    """

    kernels = "this library's MoE kernels"

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        weights = fold(tensors)
        super().__init__(spec, weights.router, "folded, moe-surgery kernels")
        self.folded_w13 = nn.Parameter(weights.w13, requires_grad=False)
        self.folded_w2 = nn.Parameter(weights.w2, requires_grad=False)
        self.folded_shared_gate_weight = _frozen(weights.gate)
        self.folded_shared_gate_proj = _frozen(weights.shared_gate)
        self.folded_shared_up_proj = _frozen(weights.shared_up)
        self.folded_shared_down_proj = _frozen(weights.shared_down)
        self.folded_terms = terms_of(spec)
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    def prepare(self, numbers: Sequence[int]) -> None:
        from moe_surgery.kernels.warming import warm

        warm(self._weights(), self.folded_terms, numbers)

    @answering
    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype; raises what :meth:`flat_tokens` raises."""
        x, weights = self.flat_tokens(hidden_states), self._weights()
        if torch.compiler.is_compiling():
            return folded_moe(x, weights, self.folded_terms).view(hidden_states.shape)
        return compute(x, weights, self.folded_terms).view(hidden_states.shape)

    def _weights(self) -> Weights:
        return Weights(
            self.fused_router,
            self.folded_w13,
            self.folded_w2,
            self.folded_shared_gate_weight,
            self.folded_shared_gate_proj,
            self.folded_shared_up_proj,
            self.folded_shared_down_proj,
        )


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
