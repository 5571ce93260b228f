"""The choice of experts, computed as the spec says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.spec import RouterSpec


@dataclass(frozen=True)
class Routing:
    """A ``custom_routing_function`` for vLLM's layers; its call signature is the same in every release.

    vLLM's own softmax routing isn't used on CPU: it takes the softmax in the logits' dtype (measured on 0.32 without
    renormalisation: up to ten times the error in float16, four times in bfloat16), ignores ``routed_scaling_factor``
    and has no sigmoid without groups. Scoring in float32 and ranking the scores, not the logits, also makes the same
    choice as transformers where scores tie. ``dtype`` is what the weights are rounded to if the spec wants them
    "native".
    """

    spec: RouterSpec
    dtype: torch.dtype

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, E] to weights [T, k] float32 and expert ids [T, k] int32."""
        logits = gating_output.float()
        scores = logits.softmax(dim=-1) if self.spec.scoring == "softmax" else logits.sigmoid()
        weights, ids = scores.topk(self.spec.top_k, dim=-1)
        if self.spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.spec.scale != 1.0:
            weights = weights * self.spec.scale
        if self.spec.weights_dtype == "native":
            weights = weights.to(self.dtype)
        return weights.float(), ids.to(torch.int32)
