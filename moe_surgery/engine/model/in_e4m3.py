"""Experts in e4m3 as vLLM's FP8 methods hold them, with a scale for each block or row: which fold, and their scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

from moe_surgery.engine.model.layers import owner
from moe_surgery.engine.model.routed import stored
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.kernels.arguments import BLOCK, Scales
from moe_surgery.weights.layout import MLPPieces, Piece
from moe_surgery.weights.tensors import BlockScales

NEEDS_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class _Form:
    """A way in which vLLM holds e4m3: its methods for experts and linear layers, and what tells others of theirs.

    ``scale`` is the name of a linear layer's; ``linear`` gives the kernel of one, None if it is stored otherwise.
    ``as_loaded`` are the kernels for linear layers that leave weights and scales as they were. A scale is that of
    ``rows`` rows; sizes must be multiples of ``size``.
    """

    method: str
    experts: Callable[[Any], bool]
    linear: Callable[[Any], object | None]
    scale: str
    as_loaded: tuple[str, ...]
    rows: int
    size: int


def _linear_in_blocks(layer: Any) -> object | None:
    ours = stored(layer) == "Fp8LinearMethod" and layer.quant_method.weight_block_size == [BLOCK, BLOCK]
    return layer.quant_method.fp8_linear if ours else None


def _linear_by_row(layer: Any) -> object | None:
    scheme: Any = getattr(layer, "scheme", None)
    ours = stored(layer) == "CompressedTensorsLinearMethod" and type(scheme).__name__ == "CompressedTensorsW8A8Fp8"
    if not ours or scheme.strategy != "channel" or scheme.is_static_input_scheme:
        return None
    kernel: object = scheme.fp8_linear
    return kernel


def _experts_by_row(method: Any) -> bool:
    weights, inputs = method.weight_quant, method.input_quant
    return bool(weights.strategy == "channel" and inputs.strategy == "token" and inputs.dynamic)


_FORMS = (
    _Form(
        method="Fp8MoEMethod",
        experts=lambda method: method.weight_block_size == [BLOCK, BLOCK],
        linear=_linear_in_blocks,
        scale="weight_scale_inv",
        as_loaded=("CutlassFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel"),
        rows=BLOCK,
        size=BLOCK,
    ),
    _Form(
        method="CompressedTensorsW8A8Fp8MoEMethod",
        experts=_experts_by_row,
        linear=_linear_by_row,
        scale="weight_scale",
        as_loaded=("CutlassFP8ScaledMMLinearKernel",),  # transposed, but not in memory
        rows=1,
        size=16,  # others are filled up
    ),
)


def form_of(experts: Any) -> _Form | None:
    """How vLLM's routed ``experts`` hold e4m3, if that is a way which the kernels take."""
    method = experts.quant_method
    return next((form for form in _FORMS if stored(experts) == form.method and form.experts(method)), None)


def not_in_e4m3(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block with quantised weights can't be folded, if it can't: the kernels take few formats of them."""
    return next(_objections(item, config), None)


def _objections(item: EngineSite, config: VllmConfig) -> Iterator[str]:
    assert item.reading is not None
    told = f"its weights are quantised ({', '.join(item.stored)})"
    if not current_platform.is_cuda():
        yield f"{told}, and are left where they are"
    experts = item.experts
    form = form_of(experts)
    if form is None:
        scales = f"a scale for each {BLOCK} by {BLOCK}, or for each row and token"
        yield f"{told}, and the kernels take experts in FP8 with {scales}"
        return
    if form.rows == BLOCK and is_deep_gemm_e8m0_used():
        yield f"{told}, and DeepGEMM has vLLM scale activations by powers of two (VLLM_USE_DEEP_GEMM_E8M0)"
    shared = item.reading.layout.shared
    for layer in () if shared is None else _layers(item.block, shared):
        kernel = form.linear(layer)
        if kernel is None:
            yield f"{told}, and its shared expert isn't stored as the routed ones are"
            return
        if (name := type(kernel).__name__) not in form.as_loaded:
            yield f"{told}, and {name} lays them out in a way of its own"
    if getattr(experts.quant_method, "weight_scale_refine", None) is not None:
        yield f"{told}, and a rank's share of them has smaller blocks"
    if config.parallel_config.tensor_parallel_size > 1:
        yield f"{told}, and what several ranks hold of them is not put together for the proof"
    for size in item.reading.spec.sizes:
        if size % form.size:
            yield f"{told}, and {size} is no multiple of {form.size}"
    if torch.cuda.get_device_capability() < NEEDS_CAPABILITY:
        yield f"{told}, and products of e4m3 need compute capability {'.'.join(map(str, NEEDS_CAPABILITY))}"


def _layers(block: nn.Module, shared: MLPPieces) -> Iterator[Any]:
    for piece in (shared.gate, shared.up, shared.down):
        yield owner(block, piece)


def matrix(layer: Any) -> Tensor:
    """The weight [N, K] of one of vLLM's linear layers, some of which transpose theirs, but not in memory."""
    weight: Tensor = layer.weight
    return weight if weight.is_contiguous() else weight.t()


def scales(experts: Any, shared: Any) -> Scales:
    """The scales of vLLM's routed ``experts`` and of what they were given as their ``shared`` expert, or None."""
    form = form_of(experts)
    assert form is not None
    routed = getattr(experts, f"w13_{form.scale}"), getattr(experts, f"w2_{form.scale}")
    if shared is None:
        return Scales(*routed)
    layers = shared.gate_up, shared.up, shared.down
    return Scales(*routed, *(None if layer is None else getattr(layer, form.scale) for layer in layers))


def copied(block: nn.Module, experts: Any, shared: MLPPieces | None, dtype: torch.dtype) -> BlockScales:
    """Copies of a shared expert's scales, for the proof of a block of ``dtype``; those of ``experts`` come later."""
    form = form_of(experts)
    if shared is None or form is None:
        return BlockScales(dtype)

    def rows(piece: Piece) -> Tensor:
        scale: Tensor = getattr(owner(block, piece), form.scale)
        begin, end = piece.rows or (0, len(scale) * form.rows)
        return scale.detach()[begin // form.rows : end // form.rows].clone()

    return BlockScales(dtype, None, None, rows(shared.gate), rows(shared.up), rows(shared.down))
