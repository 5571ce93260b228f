"""Blocks over weights in e4m3 are proven against these weights' own numbers, and wrong scales show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from folded_blocks import but
from stored_blocks import BLOCKS, GATED, ROWS, stored_weights, wide
from torch import Tensor

from moe_surgery.prove.ground import survey
from moe_surgery.prove.proof import prove_swapped
from moe_surgery.spec import MoESpec
from moe_surgery.targets import reference
from moe_surgery.weights.tensors import BlockTensors

SPECS = {
    "gated": GATED,
    "scaled": but(GATED, shared={"gate": None, "scale": 0.5}, scoring="sigmoid", scale=2.5),
    "no shared expert": replace(GATED, shared=None),
}


def computed(spec: MoESpec, tensors: BlockTensors) -> Callable[[Tensor], Tensor]:
    """A block that adds in float32, as kernels do."""

    def block(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids = reference.chosen(spec, tensors, flat)
        return reference.forward(spec, tensors, flat, torch.float32, ids).to(x.dtype).view(x.shape)

    return block


@pytest.mark.parametrize("form", [BLOCKS, ROWS])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_right_block_is_proven(spec: MoESpec, form: str) -> None:
    tensors = stored_weights(spec, torch.bfloat16, form=form)
    verdict = prove_swapped(computed(spec, tensors), survey(spec, tensors, 0))
    assert verdict.passed, verdict.reason
    assert verdict.reference == "weights" and verdict.margin > 5


def changed(tensors: BlockTensors, **scales: Tensor) -> BlockTensors:
    assert tensors.scales is not None
    return replace(tensors, scales=replace(tensors.scales, **scales))


def exchanged(t: BlockTensors) -> BlockTensors:
    s: Any = t.scales
    return changed(t, w13=s.w13.flip(1))


def of_another_expert(t: BlockTensors) -> BlockTensors:
    s: Any = t.scales
    return changed(t, w2=s.w2.roll(1, 0))


def one_for_all(t: BlockTensors) -> BlockTensors:
    s: Any = t.scales
    return changed(t, w13=s.w13.mean().expand_as(s.w13))


def of_the_shared_one(t: BlockTensors) -> BlockTensors:
    s: Any = t.scales
    return changed(t, shared_gate_proj=s.shared_up_proj, shared_up_proj=s.shared_gate_proj)


WRONG = {
    "scales of gate and up projection exchanged": exchanged,
    "scales of another expert": of_another_expert,
    "one scale for all blocks": one_for_all,
    "scales of the shared expert exchanged": of_the_shared_one,
}


@pytest.mark.parametrize("form", [BLOCKS, ROWS])
@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG.keys())
def test_wrong_scales_show(mistake: Callable[[BlockTensors], BlockTensors], form: str) -> None:
    tensors = uneven(stored_weights(GATED, torch.bfloat16, form=form))
    ground = survey(GATED, tensors, 0)
    assert prove_swapped(computed(GATED, tensors), ground).passed
    verdict = prove_swapped(computed(GATED, mistake(tensors)), ground)
    assert not verdict.passed and "reference" in verdict.reason


def uneven(tensors: BlockTensors) -> BlockTensors:
    """Scales that differ from block to block by up to a factor of two, as those of models do."""
    generator = torch.Generator().manual_seed(0)
    scales: Any = tensors.scales
    held = {name: scale for name, scale in vars(scales).items() if isinstance(scale, Tensor)}
    return changed(tensors, **{n: s * (1 + torch.rand(s.shape, generator=generator)) for n, s in held.items()})


def test_weights_that_are_no_numbers_are_told() -> None:
    tensors = stored_weights(GATED, torch.bfloat16)
    tensors.w2.view(torch.uint8)[3, 5, 7] = 0xFF
    assert survey(GATED, tensors, 0) == "the weights in w2 are not all finite, so no output can be compared"


@pytest.mark.parametrize("form", [BLOCKS, ROWS])
def test_scales_that_are_no_numbers_are_told(form: str) -> None:
    tensors = stored_weights(GATED, torch.bfloat16, form=form)
    assert tensors.scales is not None and tensors.scales.w2 is not None
    tensors = changed(tensors, w2=tensors.scales.w2.index_fill(0, torch.tensor([3]), torch.inf))
    assert survey(GATED, tensors, 0) == "the scales of w2 are not all finite, so no output can be compared"


def test_what_meets_them_is_rounded() -> None:
    """In float32 that is plain to see."""
    tensors = stored_weights(GATED, torch.float32)
    x = torch.randn(8, GATED.hidden, generator=torch.Generator().manual_seed(0))
    ids = reference.chosen(GATED, tensors, x)
    got, plain = (reference.forward(GATED, t, x, torch.float64, ids) for t in (tensors, wide(tensors)))
    apart = (got - plain).norm() / plain.norm()
    # Each of three roundings is off by up to 1/16, evenly: 1/16 / sqrt(3) on average, less where numbers are larger.
    assert 0.01 < float(apart) < 3 / 16 / 3**0.5
