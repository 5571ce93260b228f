"""The target itself: what it takes, and how it builds."""

from __future__ import annotations

from functools import cached_property

from moe_surgery.errors import UnsupportedError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context, Refusal, StandingBlock, Target
from moe_surgery.targets.folded.fitness import in_torch, objections, outside
from moe_surgery.targets.shapes import check_shapes
from moe_surgery.weights.tensors import BlockTensors


class FoldedTarget:
    """The block with its shared expert cut into experts of the routed width.

    On CUDA in this library's Triton kernels, where routing weights are kept in float32, whatever the spec says: that is
    nearer to its formula. What of a block they don't compute is plain torch around them, which the plan says. On CPU in
    the routed layer of the installed engine.
    """

    name = "folded"
    label = "folded"

    @cached_property
    def layer(self) -> Target:
        """The same on CPU."""
        from moe_surgery.targets.vllm.folded_target import FoldedLayerTarget

        return FoldedLayerTarget()

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """None if the device's kernels compute ``spec``; no weights are touched."""
        if context.device == "cpu":
            return self.layer.accepts(spec, context)
        reason = next(objections(spec, context), None)
        return None if reason is None else Refusal(reason)

    def remark(self, spec: MoESpec, context: Context) -> str | None:
        if context.device == "cpu":
            return self.layer.remark(spec, context)
        reason = next(in_torch(spec, context.dtype), None)
        return None if reason is None else f"in part by torch: {reason}"

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> StandingBlock:
        """See :meth:`moe_surgery.targets.base.Target.build`. On CUDA routed experts are used as they lie in memory."""
        context = Context(tensors.w13.device.type, str(tensors.w13.dtype).removeprefix("torch."))
        if context.device == "cpu":
            return self.layer.build(spec, tensors, prefix=prefix)
        refusal = self.accepts(spec, context)
        if refusal is not None:
            raise UnsupportedError(f"{prefix}: {refusal.reason}")
        check_shapes(spec, tensors, prefix)
        # Only now, since these need Triton.
        from moe_surgery.targets.folded.block import FoldedMoEBlock
        from moe_surgery.targets.folded.routed import RoutedExperts, RoutedMoEBlock

        if spec.at == "experts":
            return RoutedExperts(spec, tensors)
        whole = next(outside(spec, context.dtype), None) is None
        return (FoldedMoEBlock if whole else RoutedMoEBlock)(spec, tensors)
