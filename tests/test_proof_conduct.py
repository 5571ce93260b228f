"""The proof rejects blocks that compute the right function only sometimes, or do more than compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from proof_blocks import TALKER, PlainBlock, judge, reference, wrong
from spec_weights import weights
from torch import Tensor

from moe_surgery.prove.proof import prove
from moe_surgery.targets.reference import forward
from moe_surgery.weights.tensors import BlockTensors


def _in_place(self: PlainBlock, x: Tensor) -> Tensor:
    y = PlainBlock.forward(self, x)
    x[..., 0] = 0
    return y


def _reused(self: PlainBlock, x: Tensor) -> Tensor:
    y = PlainBlock.forward(self, x)
    if y.numel():
        buffer = self.__dict__.setdefault("buffer", y.new_empty(10**6))
        return buffer[: y.numel()].copy_(y.flatten()).view(y.shape)
    return y


def _stateful(self: PlainBlock, x: Tensor) -> Tensor:
    self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
    return PlainBlock.forward(self, x) * (1 + 0.01 * self.calls)


def _one_answer(self: PlainBlock, x: Tensor) -> Tensor:
    cache = self.__dict__.setdefault("cache", {})
    if x.shape not in cache:
        cache[x.shape] = PlainBlock.forward(self, x)
    return cache[x.shape].clone()


def _full(self: PlainBlock, x: Tensor) -> Tensor:
    """Experts that take no more than 48 tokens at once and drop the rest."""
    scores = self.scores(self.logits(x))
    place = F.one_hot(self.choose(scores), self.spec.router.num_experts).sum(1).cumsum(0)
    return PlainBlock.experts(self, x) * (place <= 48)[..., None]


def _never_empty(self: PlainBlock, x: Tensor) -> Tensor:
    if not x.numel():
        raise ValueError("nothing to do")
    return PlainBlock.forward(self, x)


def off_if(condition: Callable[[Tensor], bool]) -> type[PlainBlock]:
    """A block that is 10 % off on inputs that meet a condition."""
    return wrong(forward=lambda self, x: PlainBlock.forward(self, x) * (1.1 if condition(x) else 1.0))


MISCONDUCT: dict[str, tuple[type[PlainBlock], str]] = {
    "changes its input": (wrong(forward=_in_place), "changed its input in place"),
    "reuses its output": (wrong(forward=_reused), "wrote over the output"),
    "changes with every call": (wrong(forward=_stateful), "is not what the spec says"),
    "answers by shape": (wrong(forward=_one_answer), "is not what the spec says"),
    "branches above 64 tokens": (off_if(lambda x: x.shape[-2] > 64), "is not what the spec says"),
    "branches above 256 tokens": (off_if(lambda x: x.shape[-2] > 256), "is not what the spec says"),
    "branches at one token": (off_if(lambda x: x.shape[-2] == 1), "is not what the spec says"),
    "branches on many sequences": (off_if(lambda x: x.dim() == 3 and x.shape[0] > 1), "is not what the spec says"),
    "branches on 2-D": (off_if(lambda x: x.dim() == 2), "is not what the spec says"),
    "branches in inference mode": (
        off_if(lambda x: torch.is_inference_mode_enabled()),
        "asked again in inference mode",
    ),
    "branches on strides": (off_if(lambda x: not x.is_contiguous()), "every other row"),
    "clamps": (
        wrong(mix=lambda self, gate, up: F.silu(gate.clamp(max=12)) * up.clamp(-12, 12)),
        "at a saturated token",
    ),
    "adds an epsilon": (wrong(forward=lambda self, x: PlainBlock.forward(self, x) + 1e-4), "is not what the spec says"),
    "NaN for the zero token": (
        wrong(forward=lambda self, x: PlainBlock.forward(self, x) / (x != 0).any(-1, keepdim=True)),
        "an output is not finite on",
    ),
    "one expert off by 1 %": (
        wrong(
            experts=lambda self, x: (
                PlainBlock.experts(self, x)
                * torch.ones(self.spec.router.num_experts, 1).index_fill(0, torch.tensor(5), 1.01)
            )
        ),
        "is not what the spec says",
    ),
    "drops tokens from full experts": (wrong(experts=_full), "is not what the spec says"),
    "routes in bfloat16": (
        wrong(logits=lambda self, x: (x.bfloat16() @ self.t.router.bfloat16().T).float()),
        "is not what the spec says",
    ),
    "computes in bfloat16": (
        wrong(
            forward=lambda self, x: forward(self.spec, _half(self.t), x.bfloat16().flatten(0, -2)).float().view(x.shape)
        ),
        "is not what the spec says",
    ),
    "returns another dtype": (wrong(forward=lambda self, x: PlainBlock.forward(self, x).double()), "returned dtype"),
    "returns another shape": (wrong(forward=lambda self, x: PlainBlock.forward(self, x)[None]), "returned shape"),
    "returns a pair": (wrong(forward=lambda self, x: (PlainBlock.forward(self, x), None)), "returned a tuple"),
    "takes 3-D only": (wrong(forward=lambda self, x: self.tokens(x.view(-1, x.shape[2])).view(x.shape)), "IndexError"),
    "can't take an empty input": (wrong(forward=_never_empty), "raised ValueError (nothing to do) on no token"),
}


def _half(tensors: BlockTensors) -> BlockTensors:
    moved = {name: value.bfloat16() for name, value in vars(tensors).items() if isinstance(value, Tensor)}
    return replace(tensors, **moved)


@pytest.mark.parametrize("conduct", MISCONDUCT)
def test_misconduct_of_the_new_block_is_rejected(conduct: str) -> None:
    new, said = MISCONDUCT[conduct]
    verdict = judge(new, TALKER)
    assert not verdict.passed
    assert said in verdict.reason
    assert "old block" not in verdict.reason


@pytest.mark.parametrize(
    "conduct",
    [
        "changes its input",
        "branches above 64 tokens",
        "branches at one token",
        "branches in inference mode",
        "clamps",
    ],
)
def test_misconduct_of_the_old_block_is_rejected(conduct: str) -> None:
    tensors = weights(TALKER)
    verdict = prove(MISCONDUCT[conduct][0](TALKER, tensors), reference(TALKER, tensors), TALKER, tensors)
    assert not verdict.passed
    assert "old block" in verdict.reason
    assert "new block" not in verdict.reason


def test_of_an_old_block_that_raises_nothing_is_known() -> None:
    def never(self: PlainBlock, x: Tensor) -> Tensor:
        raise ValueError("not in float64")

    tensors = weights(TALKER)
    raising, right = wrong(forward=never)(TALKER, tensors), reference(TALKER, tensors)
    verdict = prove(raising, right, TALKER, tensors)
    assert (verdict.passed, verdict.powerless) == (False, True)
    assert verdict.reason == "the old block raised ValueError (not in float64) on 72 tokens in one sequence"
    # A block that is wrong is wrong all the same.
    for new in (raising, MISCONDUCT["clamps"][0](TALKER, tensors)):
        verdict = prove(raising, new, TALKER, tensors)
        assert (verdict.passed, verdict.powerless) == (False, False)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_old_block_may_take_one_kind_of_input_only(dims: int) -> None:
    def only(self: PlainBlock, x: Tensor) -> Tensor:
        if x.dim() != dims or not x.is_contiguous() or not x.numel():
            raise ValueError("not that")
        return PlainBlock.forward(self, x)

    tensors = weights(TALKER)
    verdict = prove(wrong(forward=only)(TALKER, tensors), reference(TALKER, tensors), TALKER, tensors)
    assert verdict.passed, verdict.reason
