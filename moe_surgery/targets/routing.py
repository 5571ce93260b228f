"""The choice of experts, computed as the spec says, or handed on as it was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.spec import RouterSpec
from moe_surgery.targets.formula import Arithmetic, capped, ranked, scored, weighted


@dataclass(frozen=True, eq=False)
class Routing:
    """A ``custom_routing_function`` for vLLM's layers; its call signature is the same in every release.

    vLLM's own softmax routing isn't used on CPU: it takes the softmax in the logits' dtype (measured on 0.32 without
    renormalisation: up to ten times the error in float16, four times in bfloat16), ignores ``routed_scaling_factor``
    and has no sigmoid without groups; its grouped one ranks experts outside the groups otherwise than some models do.
    What the block ranks, logits or scores, is ranked here, rounded as the block rounds it, so that the same experts are
    chosen also where a score saturates. ``dtype`` is the block's own, which the spec calls "native"; ``correction`` [E]
    is the correction bias.
    """

    spec: RouterSpec
    dtype: torch.dtype
    correction: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, E] to weights [T, k] float32 and expert ids [T, k] int32."""
        arithmetic = Arithmetic(self.dtype)
        logits = capped(self.spec, gating_output, arithmetic)
        scores = scored(self.spec, logits, arithmetic)
        ids = ranked(self.spec, logits, scores, self.correction, arithmetic).topk(self.spec.top_k, dim=-1).indices
        weights = weighted(self.spec, scores, ids)
        if self.spec.weights_dtype == "native":
            weights = weights.to(self.dtype)
        return weights.float(), ids.to(torch.int32)


def handed(weights: Tensor, ids: Tensor) -> Tensor:
    """Weights and ids [T, k] as one tensor [T, 2k] float32, to pass where vLLM's layers take logits.

    Ids are exact in float32 up to 2^24.
    """
    return torch.cat([weights.float(), ids.float()], dim=-1)


class Handed:
    """A ``custom_routing_function`` that gives back what :func:`handed` put together."""

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        weights, ids = gating_output.chunk(2, dim=-1)
        return weights.contiguous(), ids.to(torch.int32).contiguous()
