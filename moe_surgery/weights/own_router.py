"""A block's own router as something to ask: its program, run on tokens, with rounding errors where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_surgery.replay import ENTERING, ROUTING, Program
from moe_surgery.weights.tensors import BlockTensors


def asking_its_own(
    tensors: BlockTensors, program: Program, weights: Mapping[str, Tensor], experts: int, hidden: int
) -> BlockTensors:
    """``tensors`` with the router that ``program`` is, and a matrix [E, H] to make tokens with.

    The matrix is the one of the program's weights that looks like a router's, or else made of random numbers.
    Where each token visits one more expert, which returns its input, nothing scores that.
    """
    like = [held.t() if held.shape[0] == hidden else held for held in weights.values() if held.ndim == 2]
    scored = (experts, len(tensors.w13))
    matrix = next((held for count in scored for held in like if held.shape == (count, hidden)), None)
    if matrix is None or len(matrix) < experts:
        generator = torch.Generator("cpu").manual_seed(experts)
        random = torch.randn(experts, hidden, generator=generator, device="cpu") / hidden**0.5
        random = random.to(tensors.w13.dtype).to(tensors.w13.device)
        matrix = random if matrix is None else torch.cat([matrix.to(random), random[len(matrix) :]])
    matrix = matrix.to(tensors.w13.dtype)
    return replace(tensors, router=matrix, routing=AskedRouter(program.only(*ROUTING, ENTERING), weights))


class AskedRouter:
    """Tokens [T, H], and logits that aren't looked at, to routing weights and ids [T, k]."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program, self.weights = program, weights

    def __call__(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self._asked(x, lambda own: own)

    def moved(self, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        """The same with its own logits moved ``by`` [T, E] times the largest of a token's, as rounding may do."""

        def shaken(own: Tensor) -> Tensor:
            logits = own.reshape(len(by), -1).double()
            apart = by[:, : logits.shape[-1]] * logits.abs().amax(-1, keepdim=True)
            return (logits + apart).to(own.dtype).view(own.shape)

        return self._asked(x, shaken)

    def entering(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What the routed experts are given for tokens [T, H], computed in ``dtype`` or as the block does."""
        x = x if dtype is None else x.to(dtype)
        if all(name != ENTERING for name, _ in self.program.outputs):
            return x
        given = self.program.begin(x, self.weights, dtype=dtype).outputs[ENTERING]
        return given.reshape(len(x), given.shape[-1])

    def whole(self, x: Tensor, routed: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The output for tokens [T, H] whose routed experts come to ``routed`` [T, H], computed likewise."""
        if self.program.whole is None:
            return routed
        return self.program.begin(x if dtype is None else x.to(dtype), self.weights, dtype=dtype).finished(routed)

    def _asked(self, x: Tensor, shaken: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found = self.program.run(x, self.weights, shaken)
        count = found["ids"].numel() // len(x) if len(x) else 1
        weights, ids = (found[name].reshape(len(x), count) for name in ROUTING)
        return weights, ids
