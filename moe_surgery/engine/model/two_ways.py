"""The proof of a block that computes few tokens with this library's kernels, and more with vLLM's layer.

Both are asked about all tokens, so that it doesn't matter to the proof which number of them is whose. What the kernels
compute is held against the weights' own numbers, and what the layer does against the old block's parts, as if each were
a block of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.kernel_block import KernelBlock
from moe_surgery.engine.model.observing import Observation
from moe_surgery.engine.model.proving import Exam
from moe_surgery.prove.verdict import Verdict


@dataclass(eq=False)
class TwoWays:
    """One block's two proofs; ``verdict`` is that of the kernels, or of the layer where that failed."""

    kernels: Exam
    layer: Observation
    verdict: Verdict | None = None
    seconds: float = 0.0

    @property
    def ranks(self) -> Ranks:
        return self.kernels.ranks

    def ready(self, runner: Any) -> None:
        """Compute from the loaded weights all that is to be known of them."""
        self.kernels.ready(runner)

    def prove(self, block: nn.Module, runner: Any, config: VllmConfig) -> None:
        """Ask both the old block and ``block``, which is around ``runner`` and registered."""
        [computing] = (module for module in block.modules() if isinstance(module, KernelBlock))
        with computing.always(vllm=True):
            self.layer.prove(block, runner, config)
        assert self.layer.verdict is not None
        if not self.layer.verdict.passed:
            self.verdict = replace(self.layer.verdict, reason=f"with vLLM's layer: {self.layer.verdict.reason}")
            return
        with computing.always(vllm=False):
            self.kernels.prove(block, runner, config)
        assert self.kernels.verdict is not None
        told = f"{self.kernels.verdict.reason}; and with vLLM's layer: {self.layer.verdict.reason}"
        self.verdict = replace(self.kernels.verdict, reason=told)
