"""Folding in an engine: what the router gives, and which blocks can have their shared expert folded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import MoERunner

from moe_surgery.engine.model.layers import owner
from moe_surgery.engine.model.routed import choose, correction_bias
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.read.reading import Reading
from moe_surgery.spec import MoESpec
from moe_surgery.targets.vllm import folded_routing
from moe_surgery.weights.layout import Piece
from moe_surgery.weights.tensors import weight


class FoldedLogits(nn.Module):
    """Router and shared gate in one product: tokens [T, H] to [T, E], or [T, E + 1] with the gate's behind the logits.

    The parameters whose copies these are become views of them, so that what is written to them is used; where dtypes
    differ they become empty, so that nothing can be.
    """

    def __init__(self, block: nn.Module, reading: Reading) -> None:
        super().__init__()
        layout, spec = reading.layout, reading.spec
        pieces = [piece for piece in (layout.router, layout.shared_gate) if piece is not None]
        rows = [weight(block, piece.path).flatten(0, -2) for piece in pieces]
        wide = spec.router.logits_dtype == "float32"
        bias = None if layout.router_bias is None else weight(block, layout.router_bias.path)
        if bias is not None and len(rows) > 1:
            bias = torch.cat([bias, bias.new_zeros(len(rows[1]))])
        matrix = torch.cat([part.float() if wide else part for part in rows])
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(matrix.dtype, copy=True), persistent=False)
        begin = 0
        for piece, part in zip(pieces, rows, strict=True):
            _lead(_parameter(block, piece), matrix[begin : begin + len(part)])
            begin += len(part)
        if layout.router_bias is not None and isinstance(self.bias, Tensor):
            _lead(_parameter(block, layout.router_bias), self.bias[: len(rows[0])])

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.matrix, Tensor)
        return F.linear(x.to(self.matrix.dtype), self.matrix, self.bias if isinstance(self.bias, Tensor) else None)


class Chosen:
    """vLLM's own choice of experts, as a ``custom_routing_function``; the routed experts' scale is in the weights."""

    def __init__(self, runner: MoERunner, scale: float) -> None:
        self._router, self._scale = runner.router, scale

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        weights, ids = choose(self._router, hidden_states, gating_output)
        return weights if self._scale == 1.0 else weights * self._scale, ids


def not_folded(item: EngineSite) -> str | None:
    """Why a block that can be rebuilt can't have its shared expert folded."""
    assert item.reading is not None
    reason = next(folded_routing.objections(item.reading.spec), None)
    if reason is not None or item.routed is None:
        return reason
    runner = item.routed.runner
    bias = correction_bias(runner)
    if bias is not None and not any(bias is parameter for parameter in _outside(item.site.module, runner)):
        return "its correction bias lies inside its routed layer"  # which goes
    return _silent(runner, item.reading.spec)


def _silent(runner: MoERunner, spec: MoESpec) -> str | None:
    """Why a router gives no choice of its own; before 0.30, experts on a CPU choose for themselves."""
    like = runner.routed_experts.w13_weight
    try:
        choose(runner.router, like.new_zeros(1, spec.hidden), like.new_zeros(1, spec.router.num_experts))
    except Exception as error:  # whatever an operator that isn't there ends in
        return f"its router can't be asked by itself: {error}"
    return None


def _outside(block: nn.Module, runner: MoERunner) -> Iterator[nn.Parameter]:
    yield from block.parameters(recurse=False)
    for child in block.children():
        if child is not runner:
            yield from child.parameters()


def _parameter(block: nn.Module, piece: Piece) -> nn.Parameter:
    parameter = getattr(owner(block, piece), piece.path.rpartition(".")[2])
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _lead(parameter: nn.Parameter, part: Tensor) -> None:
    """Let ``parameter`` be ``part`` of what was made of it, or nothing if it can't be."""
    data = parameter.data
    parameter.data = part.view(data.shape) if part.dtype == data.dtype else data.new_empty(0)
