"""Blocks whose experts are stored in e4m3 with a scale for each block of 128 by 128, or for each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from folded_blocks import SPEC, but
from quantised_checkpoint import FORMATS
from spec_weights import weights
from torch import Tensor

from moe_surgery.kernels.arguments import Scales, Weights
from moe_surgery.spec import MoESpec
from moe_surgery.targets.e4m3 import dequantised
from moe_surgery.targets.folded.fold import fold
from moe_surgery.weights.tensors import BlockScales, BlockTensors

GATED = replace(but(SPEC, experts={"width": 128}, shared={"width": 256}), hidden=256)
PARTS = "w13", "w2", "shared_gate_proj", "shared_up_proj", "shared_down_proj"


BLOCKS, ROWS = "fp8_block", "ct_fp8_channel"


def stored_weights(spec: MoESpec, dtype: torch.dtype, device: str = "cpu", form: str = BLOCKS) -> BlockTensors:
    """Random weights, of which router and gates are in ``dtype``."""
    tensors = weights(spec, dtype, device=device)
    found = {name: _stored(getattr(tensors, name), form) for name in PARTS}
    held = {name: each["weight"] for name, each in found.items() if each}
    scales = {name: each["scale"] for name, each in found.items() if each}
    return replace(tensors, **held, scales=BlockScales(dtype, **scales))  # type: ignore[arg-type]


def held(tensors: BlockTensors) -> Weights:
    """As the kernels take them."""
    return replace(fold(tensors), scales=Scales(*(getattr(tensors.scales, name) for name in PARTS)))


def wide(tensors: BlockTensors) -> BlockTensors:
    """The same weights as numbers, so that nothing is rounded on its way to them."""
    found: dict[str, Any] = {}
    for name in PARTS:
        weight, scale = getattr(tensors, name), getattr(tensors.scales, name)
        if weight is not None:
            each = [dequantised(*one, torch.float64) for one in zip(_few(weight), _few(scale), strict=True)]
            found[name] = torch.stack(each).view(weight.shape)
    return replace(tensors, **found, scales=None)


def _stored(matrix: Tensor | None, form: str) -> dict[str, Tensor]:
    """A matrix, or several, as a checkpoint has them."""
    if matrix is None:
        return {}
    both = [tuple(FORMATS[form].quantise(one.float(), 128).values()) for one in _few(matrix)]
    each = [{"weight": weight, "scale": scale} for weight, scale in both]
    return {name: torch.stack([one[name] for one in each]).squeeze(0 if matrix.ndim == 2 else ()) for name in each[0]}


def _few(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 3 else matrix[None]
