"""The proof by parts: a block that puts them together rightly passes, and one for each mistake fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.prove.asking import Misconduct
from moe_surgery.prove.combination import Parts, make_tokens, prove_combination, shake
from moe_surgery.prove.verdict import Verdict
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec

H, W = 64, 32
SPEC = MoESpec(H, RouterSpec(4, 2, "softmax", True), ExpertsSpec(4, W, "silu"), SharedSpec(W, "silu", "sigmoid"))
DTYPE = torch.bfloat16
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block:
    """Parts that stand for layers whose weights nobody reads, put together by ``combine``."""

    def __init__(self, combine: Combine) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DTYPE)

        self.routed, self.up, self.down, self.gate = draw(H, H), draw(W, H), draw(H, W), draw(1, H)
        self.combine = combine

    def parts(self, x: Tensor, shaken: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        inner = F.silu(F.linear(x, self.up))
        inner = shake(inner) if shaken else inner
        return F.linear(x, self.routed), F.linear(inner, self.down), F.linear(x, self.gate)

    def __call__(self, x: Tensor) -> Tensor:
        return self.combine(*self.parts(x))

    def observed(self, x: Tensor, *, shaken: bool) -> Parts:
        x = x.reshape(-1, H)
        routed, shared, gate = self.parts(x, shaken)
        return Parts(self.combine(routed, shared, gate), routed, shared, gate)


def right(routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
    return routed + gate.sigmoid() * shared


WRONG: dict[str, Combine] = {
    "dropped": lambda r, s, g: r,
    "doubled": lambda r, s, g: r + 2 * g.sigmoid() * s,
    "ungated": lambda r, s, g: r + s,
    "a gate without its sigmoid": lambda r, s, g: r + g * s,
    "a gate on all": lambda r, s, g: g.sigmoid() * (r + s),
    "the gate of another token": lambda r, s, g: r + g.flatten(0, -2).roll(1, 0).view(g.shape).sigmoid() * s,
    "scaled": lambda r, s, g: 1.5 * r + g.sigmoid() * s,
    "reduced twice": lambda r, s, g: 2 * right(r, s, g),
    "not finite": lambda r, s, g: right(r, s, g) / 0,
}


def judged(new: Combine, old: Combine = right, spec: MoESpec = SPEC, **more: Any) -> Verdict:
    probes = make_tokens(H, DTYPE, torch.device("cpu"), 0)
    return prove_combination(Block(old).observed, Block(new), spec, probes, **more)


def test_a_right_combination_passes_and_the_mutants_are_far() -> None:
    verdict = judged(right)
    assert verdict.passed, verdict.reason
    assert verdict.reference == "parts"
    # Rounding to bfloat16 after each of three steps.
    assert verdict.build_error is not None and verdict.build_error < 3 * torch.finfo(DTYPE).eps
    assert {"shared expert dropped", "gate of another token", "shared expert ungated"} <= {
        mutant.name for mutant in verdict.mutants
    }
    assert verdict.margin > 5


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_new_block_fails(name: str) -> None:
    verdict = judged(WRONG[name])
    assert not verdict.passed and not verdict.powerless
    assert verdict.reason.startswith("the new block is not what the spec says")


def test_what_is_wrong_for_few_tokens_alone_is_seen_where_so_many_are_asked_about() -> None:
    few: Combine = lambda r, s, g: (2 if len(r.reshape(-1, H)) == 5 else 1) * right(r, s, g)  # noqa: E731
    assert judged(few).passed
    assert not judged(few, sizes=(5,)).passed


def test_a_wrong_reading_fails() -> None:
    verdict = judged(right, old=WRONG["doubled"])
    assert not verdict.passed
    assert verdict.reason.startswith("the old block is not what was read")


def test_a_scale_that_the_routed_layer_applied_isnt_applied_again() -> None:
    spec = replace(SPEC, router=replace(SPEC.router, scale=2.5))
    scaled: Combine = lambda r, s, g: 2.5 * r + g.sigmoid() * s  # noqa: E731
    assert judged(scaled, old=scaled, spec=spec).passed
    assert judged(right, spec=spec, inside=2.5).passed
    assert not judged(right, old=scaled, spec=spec).passed


def test_a_check_without_power_proves_nothing() -> None:
    """Where the shared expert is next to nothing, that it was dropped can't be told."""

    class Faint(Block):
        def parts(self, x: Tensor, shaken: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            routed, shared, gate = super().parts(x, shaken)
            return routed, shared * 1e-4, gate

    probes = make_tokens(H, DTYPE, torch.device("cpu"), 0)
    verdict = prove_combination(Faint(right).observed, Faint(right), SPEC, probes)
    assert not verdict.passed and verdict.powerless
    assert "can't tell" in verdict.reason


def test_rounding_before_a_layer_that_quantises_its_input_is_noise() -> None:
    """A last bit before e4m3 may move a value by a sixteenth: far more than the rounding of the sum."""

    class Quantising(Block):
        def __init__(self, combine: Combine, *, otherwise: bool) -> None:
            super().__init__(combine)
            self.otherwise = otherwise

        def parts(self, x: Tensor, shaken: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            routed, _, gate = super().parts(x)
            half = F.linear(x, self.up)
            inner = (F.silu(half.float()) * half.float()).to(DTYPE) if self.otherwise else F.silu(half) * half
            inner = shake(inner) if shaken else inner
            return routed, F.linear(inner.to(torch.float8_e4m3fn).to(DTYPE), self.down), gate

    probes = make_tokens(H, DTYPE, torch.device("cpu"), 0)
    old, new = Quantising(right, otherwise=False), Quantising(right, otherwise=True)
    verdict = prove_combination(old.observed, new, SPEC, probes)
    assert verdict.passed, verdict.reason
    assert verdict.build_error is not None and verdict.build_error > 4 * torch.finfo(DTYPE).eps / 2
    wrong = Quantising(WRONG["ungated"], otherwise=True)
    assert not prove_combination(old.observed, wrong, SPEC, probes).passed


def test_an_old_block_that_does_something_else_fails() -> None:
    def observed(x: Tensor, *, shaken: bool) -> Parts:
        raise Misconduct("doesn't call its Linear")

    verdict = prove_combination(observed, Block(right), SPEC, make_tokens(H, DTYPE, torch.device("cpu"), 0))
    assert not verdict.passed and not verdict.powerless
    assert "doesn't call its Linear" in verdict.reason
