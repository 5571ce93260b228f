"""Generated routers: after ``apply`` each token goes to the experts that it went to, or the block is left alone."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from router_blocks import HIDDEN, Block, Case, cases, near_ties
from torch import Tensor, nn

import moe_surgery
from moe_surgery.errors import ProofError

# How many examples a run makes: some in the test suite, ten thousand where the environment asks for it.
EXAMPLES = int(os.environ.get("GENERATED_ROUTERS", "60"))
SEEN: Counter[str] = Counter()
# Relative errors of tokens that went to the same experts: some roundings of weights, sums and outputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tokens(case: Case) -> Tensor:
    """Random tokens at several scales [T, H]."""
    x = torch.randn(240, HIDDEN, generator=torch.Generator().manual_seed(case.seed + 1))
    return (x * torch.tensor([0.25, 1.0, 1.0, 4.0]).repeat(60)[:, None]).to(case.dtype)


def rounded(block: Block, x: Tensor) -> Tensor:
    """How far a token's output [T] may be off by rounding in its router, relative.

    That of two logits, half a step each; and twice what the block's own weights make it be off, which below the
    smallest normal number are of a few bits, or nothing.
    """
    dtype = torch.float32 if block.case.wide_linear else x.dtype
    with torch.no_grad():
        largest = block.logits(x).double().abs().amax(-1)
        weights, ids = block.route(x)
        off = block.double_sum(x, weights.double() - block.truth(x, ids), ids).norm(dim=-1)
        size = block.double_sum(x, weights.double(), ids).norm(dim=-1)
    return torch.expm1(torch.finfo(dtype).eps * largest) + 2 * off / size.clamp_min(_least(x.dtype))


def _least(dtype: torch.dtype) -> float:
    """The norm of an output below which rounding is no longer relative: of the smallest normal numbers."""
    return float(HIDDEN**0.5 * torch.finfo(dtype).tiny)


def outcome(case: Case, target: str) -> str:
    """What became of the block: its outcome, and why; a wrong one fails the test."""
    block = Block(case)
    model = nn.Sequential(block)
    x = tokens(case)
    with torch.no_grad():
        before, ties = block(x), near_ties(block, x)
        try:
            step = moe_surgery.apply(model, target=target).steps[0]
        except ProofError as error:
            assert model[0] is block
            return f"unproven: {str(error).partition(': ')[2][:60]}"
        after = model(x)
    if step.outcome != "replaced":
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
        return f"{step.outcome}: {step.reason[:60]}"
    size = before.double().norm(dim=-1).clamp_min(_least(case.dtype))
    error = (after.double() - before.double()).norm(dim=-1) / size
    wrong = (
        (~(error < TOLERANCE[case.dtype] + rounded(block, x)) & before.isfinite().all(-1) & ~ties).nonzero().flatten()
    )
    assert not len(wrong), f"{len(wrong)} tokens without a near tie differ, by {error[wrong].tolist()[:4]}"
    return "replaced"


@pytest.mark.parametrize("target", ["auto", "reference"])
def test_no_generated_router_is_silently_wrong(target: str) -> None:
    share = EXAMPLES if target == "auto" else EXAMPLES // 4

    @settings(max_examples=share, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases())
    def check(case: Case) -> None:
        found = outcome(case, target)
        SEEN[found.partition(":")[0]] += 1
        event(found)

    check()
    assert SEEN["replaced"] > sum(SEEN.values()) // 4, SEEN
