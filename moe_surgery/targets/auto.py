"""The target "auto": which of the others takes a block, by a rule that is written down.

On CUDA the folded kernels take every block that they compute. At the talker's size they were measured to be faster than
transformers' implementations and than vLLM's own layer at every batch size from 1 to 8192 tokens, in a CUDA graph and
without one (``benchmarks/results/h100-block.json``). On CPU a shared expert is folded into vLLM's routed layer, in the
dtypes below; everything else is the installed vLLM's shared-fused layer.
"""

from __future__ import annotations

from functools import cached_property

from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context, Refusal, StandingBlock, Target
from moe_surgery.weights.tensors import BlockTensors

FOLDED_ON_CPU = ("float32", "bfloat16")
"""Where folding is faster than vLLM's shared-fused layer on a CPU (``benchmarks/results/epyc-2core-cpu_block.json``).

At the talker's size, two cores of an AMD EPYC: in float32 from 1 to 512 tokens; in bfloat16 up to 8 tokens, and up to
a seventh slower at 512, which a prompt of that length has won back after some 25 generated tokens.
"""


class AutoTarget:
    """Chooses a target for each block. A plan names the one that was chosen."""

    name = "auto"

    @cached_property
    def folded(self) -> Target:
        from moe_surgery.targets.folded.target import FoldedTarget

        return FoldedTarget()

    @cached_property
    def layer(self) -> Target:
        """The installed engine's own layer."""
        from moe_surgery.targets.vllm import VllmTarget

        return VllmTarget()

    @property
    def label(self) -> str:
        return self.layer.label

    def pick(self, spec: MoESpec, context: Context) -> tuple[Target, str | None]:
        """The target for ``spec``, and what a plan is to say of it: why it isn't the folded one, say."""
        cuda = context.device == "cuda"
        if not cuda and (spec.shared is None or context.dtype not in FOLDED_ON_CPU):
            return self.layer, None
        refusal = self.folded.accepts(spec, context)
        if refusal is None:
            return self.folded, self.folded.remark(spec, context)
        return self.layer, f"not folded: {refusal.reason}" if cuda else None

    def remark(self, spec: MoESpec, context: Context) -> str | None:
        return self.pick(spec, context)[1]

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        return self.pick(spec, context)[0].accepts(spec, context)

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> StandingBlock:
        context = Context(tensors.w13.device.type, str(tensors.w13.dtype).removeprefix("torch."))
        return self.pick(spec, context)[0].build(spec, tensors, prefix=prefix)
