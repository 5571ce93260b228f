"""Experts in e4m3 with a scale for each block, as vLLM's FP8 methods hold them: which blocks fold, and their scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

from moe_surgery.engine.model.blocks import owner
from moe_surgery.engine.model.routed import stored
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.kernels.arguments import BLOCK, Scales
from moe_surgery.weights.layout import MLPPieces
from moe_surgery.weights.tensors import BlockScales

_EXPERTS, _LINEAR = "Fp8MoEMethod", "Fp8LinearMethod"
_LINEAR_AS_LOADED = ("CutlassFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel")
"""vLLM's kernels for linear layers in blocks that leave weights and scales as they were loaded."""
NEEDS_CAPABILITY = (8, 9)


def not_in_blocks(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block with quantised weights can't be folded, if it can't: the kernels take one format of them."""
    return next(_objections(item, config), None)


def _objections(item: EngineSite, config: VllmConfig) -> Iterator[str]:
    assert item.reading is not None and item.routed is not None
    told = f"its weights are quantised ({', '.join(item.stored)})"
    if not current_platform.is_cuda():
        yield f"{told}, and are left where they are"
    experts: Any = item.routed.runner.routed_experts
    if not _of(experts, _EXPERTS):
        yield f"{told}, and the kernels take experts in FP8 with a scale for each {BLOCK} by {BLOCK}"
        return
    shared = item.reading.layout.shared
    for layer in () if shared is None else _layers(item.block, shared):
        if not _of(layer, _LINEAR):
            yield f"{told}, and its shared expert isn't stored as the routed ones are"
            return
        kernel = type(layer.quant_method.fp8_linear).__name__
        if kernel not in _LINEAR_AS_LOADED:
            yield f"{told}, and {kernel} lays them out in a way of its own"
    if is_deep_gemm_e8m0_used():
        yield f"{told}, and activations are scaled by powers of two (VLLM_USE_DEEP_GEMM_E8M0)"
    if experts.quant_method.weight_scale_refine is not None:
        yield f"{told}, and a rank's share of them has smaller blocks"
    if config.parallel_config.tensor_parallel_size > 1:
        yield f"{told}, and what several ranks hold of them is not put together for the proof"
    spec = item.reading.spec
    for size in (spec.hidden, spec.experts.width, *((spec.shared.width,) if spec.shared else ())):
        if size % BLOCK:
            yield f"{told}, and {size} is no multiple of {BLOCK}"
    if torch.cuda.get_device_capability() < NEEDS_CAPABILITY:
        yield f"{told}, and products of e4m3 need compute capability {'.'.join(map(str, NEEDS_CAPABILITY))}"


def _of(layer: Any, method: str) -> bool:
    """Whether a layer is stored by this method, in blocks of the size that the kernels take."""
    return stored(layer) == method and layer.quant_method.weight_block_size == [BLOCK, BLOCK]


def _layers(block: nn.Module, shared: MLPPieces) -> Iterator[Any]:
    for piece in (shared.gate, shared.up, shared.down):
        yield owner(block, piece)


def scales(experts: Any, shared: Any) -> Scales:
    """The scales of vLLM's routed ``experts`` and of what they were given as their ``shared`` expert, or None."""
    routed = experts.w13_weight_scale_inv, experts.w2_weight_scale_inv
    if shared is None:
        return Scales(*routed)
    layers = shared.gate_up, shared.up, shared.down
    return Scales(*routed, *(None if layer is None else layer.weight_scale_inv for layer in layers))


def copied(block: nn.Module, shared: MLPPieces | None, dtype: torch.dtype) -> BlockScales:
    """Copies of a shared expert's scales, for the proof of a block of ``dtype``; the routed experts' come later."""
    if shared is None:
        return BlockScales(dtype)

    def rows(piece: Any) -> Tensor:
        scale: Tensor = owner(block, piece).weight_scale_inv  # type: ignore[assignment]
        begin, end = piece.rows or (0, len(scale) * BLOCK)
        return scale.detach()[begin // BLOCK : end // BLOCK].clone()

    return BlockScales(dtype, None, None, rows(shared.gate), rows(shared.up), rows(shared.down))
