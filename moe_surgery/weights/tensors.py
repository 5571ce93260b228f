"""The tensors of a block, gathered by role; moved by reference wherever the model already holds them in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_surgery.weights.layout import Layout, MLPPieces, Piece

OwnRouting = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A model's own router: tokens [T, H] and logits [T, E] to routing weights [T, k] and expert ids [T, k]."""


@dataclass(frozen=True, eq=False)
class BlockScales:
    """What a block's experts in e4m3 are multiplied by: a number for each block of a matrix, or for each row.

    The tensors are named as in :class:`BlockTensors`; of a matrix [N, K] they are [N / B, K / B] or [N, 1] in float32.
    ``dtype`` is the block's own, which gate and up projections are rounded to before what they make is rounded to e4m3.
    """

    dtype: torch.dtype
    w13: Tensor | None = None
    w2: Tensor | None = None
    shared_gate_proj: Tensor | None = None
    shared_up_proj: Tensor | None = None
    shared_down_proj: Tensor | None = None


@dataclass(frozen=True, eq=False)
class BlockTensors:
    """The weights of one block in canonical order. All share one device, and all matrices but ``router`` one dtype.

    ``router`` [E, H]; ``w13`` [E, 2I, H], gate rows before up rows ([E, I, H] without an up projection); ``w2``
    [E, H, I]; with a shared expert of width S, ``shared_gate_proj`` and ``shared_up_proj`` [S, H] and
    ``shared_down_proj`` [H, S]; with a gate on the shared expert, ``shared_gate`` [1, H].

    ``copied`` is true when ``w13`` and ``w2`` had to be stacked from single matrices, so that they are new memory.
    ``routing`` is the router of a spec whose scoring is "own". ``router_bias`` and ``correction_bias`` [E],
    ``w13_bias`` [E, 2I], ``w2_bias`` [E, H] and ``output_bias`` [H] are None where the spec has none. With ``scales``
    the experts' matrices, the shared one's among them, are in e4m3.
    """

    router: Tensor
    w13: Tensor
    w2: Tensor
    shared_gate_proj: Tensor | None
    shared_up_proj: Tensor | None
    shared_down_proj: Tensor | None
    shared_gate: Tensor | None
    copied: bool
    routing: OwnRouting | None = None
    router_bias: Tensor | None = None
    correction_bias: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    output_bias: Tensor | None = None
    scales: BlockScales | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the block computes in."""
        return self.w13.dtype if self.scales is None else self.scales.dtype

    def of_experts(self) -> BlockTensors:
        """The same for the routed experts alone."""
        router = self.w13.new_empty(0, self.w13.shape[-1])
        return BlockTensors(
            router, self.w13, self.w2, None, None, None, None, self.copied, w13_bias=self.w13_bias, w2_bias=self.w2_bias
        )


def weight(block: nn.Module, path: str) -> Tensor:
    """A parameter or buffer of the block, without its gradient's history."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(owner), name)
    return tensor.detach()


def stacked(tensor: Tensor) -> Tensor:
    """A parameter of three dimensions, or of more, as one stack of matrices."""
    return tensor.flatten(0, -3) if tensor.ndim > 3 else tensor


def gather(block: nn.Module, layout: Layout) -> BlockTensors:
    """Collect a block's tensors by role, without copying what already lies in the target's order."""

    def matrix(piece: Piece) -> Tensor:
        tensor = weight(block, piece.path)
        tensor = tensor.flatten(1) if piece.index is None else stacked(tensor)[piece.index]
        if piece.rows is not None:
            tensor = tensor[piece.rows[0] : piece.rows[1]]
        if piece.transposed:
            tensor = tensor.t()
        tensor = tensor if piece.cols is None else tensor[:, piece.cols[0] : piece.cols[1]]
        return tensor if piece.out is None else tensor[slice(*piece.out)]

    def optional(piece: Piece | None) -> Tensor | None:
        return None if piece is None else matrix(piece)

    def vector(piece: Piece | None) -> Tensor | None:
        if piece is None:
            return None
        tensor = weight(block, piece.path)
        tensor = tensor.reshape(-1) if piece.index is None else tensor[piece.index]
        tensor = tensor if piece.rows is None else tensor[piece.rows[0] : piece.rows[1]]
        return tensor if piece.out is None else tensor[slice(*piece.out)]

    def gate_up(mlp: MLPPieces) -> Tensor:
        return matrix(mlp.gate) if mlp.up == mlp.gate else torch.cat([matrix(mlp.gate), matrix(mlp.up)])

    def biases(*names: str) -> Tensor | None:
        if not any(bias is not None for bias in layout.experts[0].biases()):
            return None
        return torch.stack([torch.cat([bias(mlp, name) for name in names if has(mlp, name)]) for mlp in layout.experts])

    def has(mlp: MLPPieces, name: str) -> bool:
        return name != "up" or mlp.up != mlp.gate

    def bias(mlp: MLPPieces, name: str) -> Tensor:
        held = vector(getattr(mlp, f"{name}_bias"))
        projection = matrix(getattr(mlp, name))
        return projection.new_zeros(projection.shape[0]) if held is None else held

    packed = layout.packed
    if packed is not None:
        w13, w2 = (stacked(weight(block, path))[: len(layout.experts)] for path in packed)
    else:
        w13 = torch.stack([gate_up(expert) for expert in layout.experts])
        w2 = torch.stack([matrix(expert.down) for expert in layout.experts])
    shared = layout.shared
    return BlockTensors(
        router=matrix(layout.router) if layout.router.path else w13.new_empty(0, w13.shape[-1]),
        w13=w13,
        w2=w2,
        shared_gate_proj=matrix(shared.gate) if shared else None,
        shared_up_proj=matrix(shared.up) if shared and shared.up != shared.gate else None,
        shared_down_proj=matrix(shared.down) if shared else None,
        shared_gate=optional(layout.shared_gate),
        copied=packed is None,
        router_bias=vector(layout.router_bias),
        correction_bias=vector(layout.correction_bias),
        w13_bias=biases("gate", "up"),
        w2_bias=biases("down"),
        output_bias=vector(layout.output_bias),
    )
