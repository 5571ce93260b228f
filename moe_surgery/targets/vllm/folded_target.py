"""The target "folded" on CPU: the shared expert among the experts of the installed vLLM's routed layer."""

from __future__ import annotations

from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context, Refusal
from moe_surgery.targets.vllm.block import FusedMoEBlock
from moe_surgery.targets.vllm.folded_routing import objections
from moe_surgery.targets.vllm.target import VllmTarget
from moe_surgery.weights.tensors import BlockTensors


class FoldedLayerTarget(VllmTarget):
    """vLLM's routed layer alone, in which the shared expert is further experts that every token visits."""

    name = "folded"

    @property
    def label(self) -> str:
        return f"folded, {self.installed.era.label}"

    def _refuse_early(self, spec: MoESpec, context: Context) -> Refusal | None:
        reason = next(objections(spec), None)
        return super()._refuse_early(spec, context) if reason is None else Refusal(reason)

    def _build(self, spec: MoESpec, tensors: BlockTensors, prefix: str) -> FusedMoEBlock:
        layer = self._builder.FusedLayer(spec, tensors, prefix, fold=True)
        return FusedMoEBlock(spec, tensors, layer, self.label, folded=True)
