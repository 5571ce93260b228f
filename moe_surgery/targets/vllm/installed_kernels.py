"""What the installed kernels take, found by asking them rather than by a list of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors

LARGEST_MULTIPLE = 1024
"""The largest alignment of a size that is looked for when a size is refused."""


@dataclass(frozen=True)
class Kernels:
    """The kernels that an era's ``builder`` reaches on ``device`` in ``dtype``; ``name`` is what refusals call them."""

    builder: Any
    device: str
    dtype: torch.dtype
    name: str

    def objection(self, spec: MoESpec) -> str | None:
        """Why ``spec`` can't be built, in words with arithmetic where it is about a size; None if it can."""
        if self.builder.platform() != self.device:
            return f"{self.name} were built for {self.builder.platform()}"
        error = self._asked(spec)
        if error is None:
            error = self._tried(spec)
            return None if error is None else f"{self.name} fail on this machine: {error}"
        for what, size, multiple in self._misfits(spec):
            return f"{what} {size} is not a multiple of {multiple}, which {self.name} require"
        return f"{self.name} refuse: {error}"

    def _misfits(self, spec: MoESpec) -> Iterator[tuple[str, int, int]]:
        """Sizes that break an alignment. The alignment is the smallest power of two that is accepted as that size."""
        easy = _with(spec, hidden=LARGEST_MULTIPLE, width=LARGEST_MULTIPLE, activation="silu")
        for what, key, size in (("hidden size", "hidden", spec.hidden), ("expert width", "width", spec.experts.width)):
            multiple = 1
            while multiple <= LARGEST_MULTIPLE and self._asked(_with(easy, **{key: multiple})) is not None:
                multiple *= 2
            if multiple <= LARGEST_MULTIPLE and size % multiple:
                yield what, size, multiple

    def _asked(self, spec: MoESpec) -> Exception | None:
        """What vLLM raises when it selects kernels for ``spec``; on the meta device."""
        try:
            self.builder.check(spec, self.device, self.dtype)
        except Exception as error:
            return error
        return None

    def _tried(self, spec: MoESpec) -> Exception | None:
        """What is raised when one expert of the true size runs on one token: are the kernels there, in this dtype?"""
        small = replace(
            spec,
            router=replace(spec.router, num_experts=1, top_k=1, correction_bias=False, groups=None),
            experts=replace(spec.experts, num_experts=1, biases=False),
            shared=None,
            at="block",
        )
        like = {"dtype": self.dtype, "device": self.device}
        hidden, width = spec.hidden, spec.experts.width
        rows = 2 * width if spec.experts.gated else width
        w13, w2 = torch.zeros(1, rows, hidden, **like), torch.zeros(1, hidden, width, **like)  # type: ignore
        x, logits = torch.zeros(1, hidden, **like), torch.zeros(1, 1, **like)  # type: ignore
        try:
            self.builder.FusedLayer(small, BlockTensors(logits, w13, w2, None, None, None, None, False), "trial")(
                x, logits
            )
        except Exception as error:
            return error
        return None


def _with(spec: MoESpec, *, hidden: int | None = None, **experts: Any) -> MoESpec:
    """``spec`` with another hidden size and with other values of its experts."""
    return replace(spec, hidden=hidden or spec.hidden, experts=replace(spec.experts, **experts))
