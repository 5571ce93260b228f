"""The block that takes the place of a model's own: vLLM's layer behind the interface the model expects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import answering
from moe_surgery.targets.guarded import GuardedBlock, measure
from moe_surgery.targets.reference import within
from moe_surgery.targets.routing import handed
from moe_surgery.targets.shared_as_experts import router_rows
from moe_surgery.weights.tensors import BlockTensors


class FusedMoEBlock(GuardedBlock):
    """A sparse-MoE block computed by vLLM's kernels.

    vLLM keeps the forward context in a module global: run one thread of a process at a time.
    """

    kernels = "vLLM's MoE layers"

    def __init__(
        self, spec: MoESpec, tensors: BlockTensors, fused: nn.Module, label: str, *, folded: bool = False
    ) -> None:
        """``folded``: ``fused`` takes the shared expert's gate behind the router's logits, if there is one."""
        super().__init__(spec, router_rows(tensors) if folded else tensors.router, label, tensors.w13.dtype)
        bias = tensors.router_bias
        if bias is not None and len(self.fused_router) > len(bias):
            bias = torch.cat([bias, bias.new_zeros(1)])
        self.fused_router_bias, self.fused_output_bias = _frozen(bias), _frozen(tensors.output_bias)
        self.fused = fused
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    @answering
    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype; raises what :meth:`flat_tokens` raises."""
        x = self.flat_tokens(hidden_states)
        work = torch.float32 if self.spec.router.logits_dtype == "float32" else x.dtype
        bias = None if self.fused_router_bias is None else self.fused_router_bias.to(work)
        logits = F.linear(x.to(work), self.fused_router.to(work), bias)
        out: Tensor = self.fused(x, logits)
        if self.fused_output_bias is not None:
            out = out + self.fused_output_bias
        return out.view(hidden_states.shape)

    def _own_parameters(self) -> Iterable[nn.Parameter]:
        return (self.fused_router, *self.fused.parameters())


class FusedExperts(FusedMoEBlock):
    """The routed experts alone, behind the router of the model's own, computed by vLLM's kernels, for inference.

    Takes tokens ``[..., H]``, expert ids [T, k] and routing weights [T, k], and returns the weighted sum ``[..., H]``.
    Ids beyond the experts stand for none, as they do for transformers' experts.
    """

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        """See :meth:`FusedMoEBlock.forward` for the errors it raises."""
        arguments = self.arguments(given, named)
        hidden_states, ids, weights = arguments.hidden_states, arguments.ids, arguments.weights
        x = self.flat_tokens(hidden_states)
        experts, count = self.spec.experts, ids.shape[-1]
        ids, weights = ids.reshape(-1, count), weights.reshape(-1, count).float() * self.spec.router.scale
        kept, scaled = within(ids, weights, experts.num_experts)
        out: Tensor = self.fused(x, handed(scaled, kept))
        if experts.identities:
            own = (ids >= experts.num_experts) & (ids < experts.acting)
            out = out + (x * weights.where(own, 0.0).sum(-1, keepdim=True)).to(x.dtype)
        return self.answered(arguments, out.view(hidden_states.shape))


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
