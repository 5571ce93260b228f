"""Blocks whose experts are chosen outside of the kernels: by a router in plain torch, or by the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.kernels.arguments import Routed, Weights
from moe_surgery.kernels.op import compute, compute_routing, route, routed_moe
from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import answering
from moe_surgery.targets.folded.fitness import beside, routed_in_torch
from moe_surgery.targets.folded.fold import fold, router_terms_of, terms_of
from moe_surgery.targets.formula import mixer
from moe_surgery.targets.guarded import GuardedBlock, measure
from moe_surgery.targets.routing import Routing
from moe_surgery.targets.shared_expert import shared_output
from moe_surgery.weights.tensors import BlockTensors


class _RoutedBlock(GuardedBlock):
    """The routed experts, and the shared expert where it can be among them, in one operator."""

    kernels = "this library's MoE kernels"

    def __init__(self, spec: MoESpec, tensors: BlockTensors, label: str) -> None:
        apart = spec.shared is not None and next(beside(spec), None) is not None
        held = fold(tensors, beside=apart)
        super().__init__(spec, held.router, label, held.w13.dtype)
        self._beside = apart
        self.folded_terms = terms_of(spec, given=True, beside=apart)
        self.folded_w13 = nn.Parameter(held.w13, requires_grad=False)
        self.folded_w2 = nn.Parameter(held.w2, requires_grad=False)
        self.folded_w13_bias, self.folded_w2_bias = _frozen(held.w13_bias), _frozen(held.w2_bias)
        self.folded_shared_gate_weight = _frozen(tensors.shared_gate)
        self.folded_shared_gate_proj = _frozen(tensors.shared_gate_proj if self._beside else held.shared_gate)
        self.folded_shared_up_proj = _frozen(tensors.shared_up_proj if self._beside else held.shared_up)
        self.folded_shared_down_proj = _frozen(tensors.shared_down_proj if self._beside else held.shared_down)

    def _experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum [T, H] of the experts ``ids`` [T, k], and of the shared expert where it is among them.

        ``weights`` [T, k] are float32. Ids beyond the routed experts are of those that return their input, or of none.
        """
        experts = self.spec.experts
        kept = torch.where(ids < experts.num_experts, ids, -1).to(torch.int32)
        slots = weights.masked_fill(kept < 0, 0.0)
        if self.folded_terms.slices:
            slots = torch.cat([slots, self._shared_weight(x).expand(-1, self.folded_terms.slices)], dim=-1)
        out = self._visited(x, Routed(kept.contiguous(), slots.contiguous()))
        if experts.identities:
            own = (ids >= experts.num_experts) & (ids < experts.acting)
            out = out + (x * weights.where(own, 0.0).sum(-1, keepdim=True)).to(x.dtype)
        return out

    def _visited(self, x: Tensor, routed: Routed) -> Tensor:
        """What the experts make of tokens [T, H] that are ``routed``."""
        terms, count = self.folded_terms, routed.ids.shape[-1]
        if count != terms.top_k:
            terms = replace(terms, top_k=count)
        return (routed_moe if torch.compiler.is_compiling() else compute)(x, self._held(), terms, routed)

    def prepare(self, numbers: Sequence[int]) -> None:
        from moe_surgery.kernels.warming import warm

        warm(self._held(), self.folded_terms, numbers)

    def _held(self) -> Weights:
        """The experts' weights, as the kernels take them."""
        gate, up, down = (None, None, None) if self._beside else self._shared()
        return Weights(
            self.folded_w13,
            self.folded_w13,
            self.folded_w2,
            None,
            gate,
            up,
            down,
            self.folded_w13_bias,
            self.folded_w2_bias,
        )

    def _shared(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.folded_shared_gate_proj, self.folded_shared_up_proj, self.folded_shared_down_proj

    def _shared_weight(self, x: Tensor) -> Tensor:
        """What the shared expert's output is multiplied by, [T, 1] float32."""
        assert self.spec.shared is not None
        scale = self.spec.shared.scale
        if self.folded_shared_gate_weight is None:
            return x.new_full((len(x), 1), scale, dtype=torch.float32)
        return F.linear(x, self.folded_shared_gate_weight).float().sigmoid() * scale

    def _own_parameters(self) -> Iterable[nn.Parameter]:
        return self.parameters(recurse=False)


class RoutedMoEBlock(_RoutedBlock):
    """A sparse-MoE block whose router is an operator of its own: a kernel, or plain torch where that can't do it."""

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        inside = next(routed_in_torch(spec, str(tensors.w13.dtype).removeprefix("torch.")), None) is None
        super().__init__(spec, tensors, f"moe-surgery kernels behind a router in {'one' if inside else 'torch'}")
        mixed = self._beside or spec.experts.total > spec.experts.num_experts
        self.folded_router = router_terms_of(spec, beside=mixed) if inside else None
        self.folded_router_bias, self.folded_output_bias = _frozen(tensors.router_bias), _frozen(tensors.output_bias)
        self.folded_correction_bias = _frozen(tensors.correction_bias)
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    @answering
    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype; raises what :meth:`flat_tokens` raises."""
        x = self.flat_tokens(hidden_states)
        if self.folded_router is None:
            weights, ids = self._routed(x)
            out = self._experts(x, ids, weights)
        else:
            choose = route if torch.compiler.is_compiling() else compute_routing
            gate = self.folded_shared_gate_weight if self.folded_router.gated else None
            given = self.fused_router, self.folded_router_bias, self.folded_correction_bias, gate
            routed = choose(x, *given, self.folded_router)
            held = self.spec.experts.total == self.spec.experts.num_experts
            out = self._visited(x, routed) if held else self._experts(x, *routed)
        if self._beside:
            out = out + self._shared_output(x)
        if self.folded_output_bias is not None:
            out = out + self.folded_output_bias
        return out.view(hidden_states.shape)

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights [T, k] float32 and ids [T, k], in plain torch."""
        router = self.spec.router
        work = torch.float32 if router.logits_dtype == "float32" else x.dtype
        bias = None if self.folded_router_bias is None else self.folded_router_bias.to(work)
        logits = F.linear(x.to(work), self.fused_router.to(work), bias)
        return Routing(router, x.dtype, self.folded_correction_bias)(x, logits, router.top_k, router.renormalize)

    def _shared_output(self, x: Tensor) -> Tensor:
        assert self.spec.shared is not None
        gate, up, down = self._shared()
        assert gate is not None and down is not None
        half = F.linear(x, gate)
        mixed = mixer(self.spec.shared.mix)(half, half if up is None else F.linear(x, up))
        logit = None if self.folded_shared_gate_weight is None else F.linear(x, self.folded_shared_gate_weight)
        return shared_output(self.spec, F.linear(mixed, down), logit)


class RoutedExperts(_RoutedBlock):
    """The routed experts alone, behind the router of the model's own.

    Takes tokens ``[..., H]``, expert ids [T, k] and routing weights [T, k], and returns the weighted sum ``[..., H]``.
    Ids beyond the experts stand for none, as they do for transformers' experts.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        super().__init__(spec, tensors, "moe-surgery kernels behind its own router")
        self.new_bytes, self.moved_bytes = measure(self, tensors)
        self.eval()

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        """See :meth:`RoutedMoEBlock.forward` for the errors it raises."""
        arguments = self.arguments(given, named)
        hidden_states, ids = arguments.hidden_states, arguments.ids
        x, count = self.flat_tokens(hidden_states), ids.shape[-1]
        scaled = arguments.weights.reshape(-1, count).float() * self.spec.router.scale
        out = self._experts(x, ids.reshape(-1, count), scaled).view(hidden_states.shape)
        return self.answered(arguments, out)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
