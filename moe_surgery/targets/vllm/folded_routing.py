"""A shared expert inside vLLM's routed layer: as further experts, which the routing function adds to each token's.

Only public arguments of vLLM's layers are used: more experts, a greater top-k, and ``custom_routing_function``, which
every release honours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_surgery.spec import MoESpec
from moe_surgery.targets.shared_as_experts import slices, unfoldable

Choose = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]
"""A ``custom_routing_function``: tokens [T, H], logits [T, E], top-k and renormalisation to weights and ids [T, k]."""


@dataclass(frozen=True, eq=False)
class FoldedRouting:
    """The routing of ``inner``, and after it the shared expert's slices, which lie behind the ``experts`` routed ones.

    What takes the place of the logits is [T, E], or [T, E + 1] with the shared expert's gate behind them.
    """

    inner: Choose
    experts: int
    top_k: int
    slices: int
    scale: float

    @classmethod
    def of(cls, spec: MoESpec, inner: Choose) -> FoldedRouting:
        assert spec.shared is not None
        return cls(inner, spec.experts.num_experts, spec.router.top_k, slices(spec), spec.shared.scale)

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """To weights [T, k + M] float32 and expert ids [T, k + M] int32."""
        logits = gating_output[:, : self.experts]
        weights, ids = self.inner(hidden_states, logits, self.top_k, renormalize)
        gate = gating_output[:, self.experts :].float()
        shared = gate.sigmoid() * self.scale if gate.shape[1] else weights.new_full((len(weights), 1), self.scale)
        more = torch.arange(self.experts, self.experts + self.slices, dtype=torch.int32, device=ids.device)
        every = (len(weights), self.slices)
        return (
            torch.cat([weights.float(), shared.expand(every)], dim=-1),
            torch.cat([ids.to(torch.int32), more.expand(every)], dim=-1),
        )


def folded(spec: MoESpec) -> MoESpec:
    """What vLLM's layer is built for: the spec with the shared expert among the routed ones."""
    more = slices(spec)
    router, experts = spec.router, spec.experts
    return replace(
        spec,
        router=replace(router, num_experts=router.num_experts + more, top_k=router.top_k + more),
        experts=replace(experts, num_experts=experts.num_experts + more),
        shared=None,
    )


def objections(spec: MoESpec) -> Iterator[str]:
    """Why the shared expert of ``spec`` can't be folded into vLLM's layer."""
    experts = spec.experts
    if spec.shared is None:
        yield "there is no shared expert to fold"
    held = {
        "biases in its experts": experts.biases,
        "weighted inputs": experts.weights_on == "input",
        "identity experts": experts.identities > 0,
        "ids for no routed expert": experts.empty > 0,
    }
    for what, value in held.items():
        if value:
            yield f"the shared expert has no part in {what}"
    yield from unfoldable(spec)
