"""How far a block of kernels may be off: as far as right ones are, and no mutant passes by it, at real widths too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from proof_blocks import TALKER, THINKER, PlainBlock
from spec_weights import weights
from torch import Tensor
from vllm_blocks import TARGET

from moe_surgery.prove.ground import Ground, survey
from moe_surgery.prove.limits import KERNELS, of_kernels
from moe_surgery.prove.proof import prove_reading, prove_swapped
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors

REAL = replace(
    TALKER,
    hidden=2048,
    router=replace(TALKER.router, num_experts=8, top_k=2),
    experts=replace(TALKER.experts, num_experts=8, width=768),
    shared=replace(TALKER.shared, width=2048) if TALKER.shared else None,
)


def surveyed(spec: MoESpec, tensors: BlockTensors) -> Ground:
    ground = survey(spec, tensors, 0)
    assert isinstance(ground, Ground)
    return ground


@pytest.fixture(scope="module")
def real() -> Ground:
    return surveyed(REAL, weights(REAL, torch.bfloat16))


def test_a_right_layer_of_vllms_passes_at_real_width_in_bfloat16(real: Ground) -> None:
    block = TARGET.build(REAL, weights(REAL, torch.bfloat16), prefix="real.mlp")
    verdict = prove_swapped(block, real)
    assert verdict.passed, verdict.reason


def _zeroed(tensors: BlockTensors) -> BlockTensors:
    w2 = tensors.w2.clone()
    w2[5] = 0
    return replace(tensors, w2=w2)


def _twice(name: str) -> Callable[[BlockTensors], BlockTensors]:
    return lambda tensors: replace(tensors, **{name: 2 * getattr(tensors, name)})


BROKEN: dict[str, Callable[[BlockTensors], BlockTensors]] = {
    "expert 5 zeroed": _zeroed,
    "gate and up swapped": lambda tensors: replace(tensors, w13=tensors.w13.roll(REAL.experts.width, 1)),
    "router rows shifted by one expert": lambda tensors: replace(tensors, router=tensors.router.roll(1, 0)),
    "routed experts doubled": _twice("w2"),
    "shared expert doubled": _twice("shared_down_proj"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_layer_of_vllms_fails_at_real_width_in_bfloat16(real: Ground, fault: str) -> None:
    block = TARGET.build(REAL, BROKEN[fault](weights(REAL, torch.bfloat16)), prefix=f"{fault}.mlp")
    verdict = prove_swapped(block, real)
    assert not verdict.passed
    assert not verdict.powerless


class Off(PlainBlock):
    """Farther from right than plain torch is: every output is too large by ``off``, relative."""

    off = 0.0

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) * (1.0 + self.off)


def _least(ground: Ground) -> float:
    """The limit of plain torch, in the family that has the least."""
    return ground.slack * min(ground.noise)


@pytest.mark.parametrize(("limits", "passes"), [(1.06, True), (0.9 * KERNELS, True), (1.1 * KERNELS, False)])
def test_kernels_may_round_at_other_places(limits: float, passes: bool) -> None:
    tensors = weights(TALKER, torch.float32)
    ground = surveyed(TALKER, tensors)
    block = Off(TALKER, tensors)
    block.off = limits * _least(of_kernels(ground))
    assert prove_swapped(block, ground).passed == passes
    assert not prove_reading(block, TALKER, tensors).passed  # plain torch rounds where the spec does


def test_a_mutant_within_the_limit_of_kernels_fails() -> None:
    """Its error is one that a right layer may have; but it is that of a mutant, which the check then can't tell."""
    tensors = weights(THINKER, torch.float32)
    apart = 1.5 * _least(of_kernels(surveyed(THINKER, tensors)))
    spec = replace(THINKER, router=replace(THINKER.router, scale=1.0 + apart))
    ground = surveyed(spec, tensors)
    assert prove_swapped(PlainBlock(spec, tensors), ground).passed
    verdict = prove_swapped(PlainBlock(THINKER, tensors), ground)
    assert not verdict.passed
    assert "can't tell “routed scale dropped”" in verdict.reason
