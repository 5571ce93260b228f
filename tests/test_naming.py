"""A wrong block is named by the mutant that it computes as."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from proof_blocks import DTYPES, TALKER, PlainBlock
from spec_weights import weights
from torch import Tensor

from moe_surgery.prove.ground import Ground, survey
from moe_surgery.prove.naming import NEARER, Contrast, answers_of, contrasts, named
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def found(block: PlainBlock, tensors: BlockTensors, spec: MoESpec = TALKER) -> list[Contrast]:
    ground = survey(spec, tensors, 0)
    assert isinstance(ground, Ground)
    return contrasts(answers_of(block, ground), ground)


class UngatedShared(PlainBlock):
    def shared_gate(self, x: Tensor) -> Tensor | float:
        return 1.0


class Renormalised(PlainBlock):
    def weigh(self, chosen: Tensor) -> Tensor:
        return chosen


class Noisy(PlainBlock):
    """Wrong in a way that no mutant is."""

    def routed(self, x: Tensor) -> Tensor:
        return super().routed(x) * torch.linspace(0.9, 1.1, x.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(UngatedShared, "shared expert ungated"), (Renormalised, "not renormalised")],
)
def test_a_known_mistake_is_named(kind: type[PlainBlock], name: str, dtype: torch.dtype) -> None:
    tensors = weights(TALKER, dtype)
    assert named(found(kind(TALKER, tensors), tensors)) == name


def test_an_expert_with_other_weights_is_named_by_its_number() -> None:
    tensors = weights(TALKER, torch.float32)
    w2 = tensors.w2.clone()
    w2[5] = 0
    assert named(found(PlainBlock(TALKER, replace(tensors, w2=w2)), tensors)) == "expert 5 zeroed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_block_is_like_no_mistake(dtype: torch.dtype) -> None:
    tensors = weights(TALKER, dtype)
    contrast = found(PlainBlock(TALKER, tensors), tensors)
    assert named(contrast) is None
    assert contrast[0].ratio > NEARER


def test_a_mutant_that_the_weights_make_true_is_not_told_from_the_truth() -> None:
    tensors = weights(TALKER, torch.float32)
    assert tensors.shared_down_proj is not None
    tensors = replace(tensors, shared_down_proj=torch.zeros_like(tensors.shared_down_proj))
    contrast = found(PlainBlock(TALKER, tensors), tensors)
    assert {one.name for one in contrast if one.ratio < NEARER} >= {"shared expert dropped", "shared expert doubled"}


def test_a_mistake_of_its_own_is_not_given_a_name() -> None:
    tensors = weights(TALKER, torch.float32)
    assert named(found(Noisy(TALKER, tensors), tensors)) is None
