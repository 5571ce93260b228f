"""Reading at any size: 1 to 512 experts, any top-k, and parameters kept in other dtypes than the block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import plain
from zoo.plain import Sizes, block_class
from zoo.same import Holder, assert_reads_right, distance

import moe_surgery
from moe_surgery.read.block import read, read_within
from moe_surgery.read.experts import read_experts
from moe_surgery.read.reading import Unreadable

LEAN = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
COUNTS = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 128, 160, 256, 512]))


class ExpertsAlone(nn.Module):
    """Stacked experts behind a router of somebody else's: tokens, ids and weights."""

    def __init__(self, experts: int, hidden: int = 32, width: int = 16) -> None:
        super().__init__()
        self.up = plain.parameter(experts, hidden, 2 * width)
        self.down = plain.parameter(experts, width, hidden)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            gate, up = (x[rows] @ self.up[expert]).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ self.down[expert]
            out.index_add_(0, rows, (y * weights[rows, slots, None]).to(out.dtype))
        return out


@LEAN
@given(COUNTS, st.integers(1, 16), st.sampled_from([plain.Packed, plain.ListOfMLPs]))
def test_any_count_of_experts_and_any_top_k_is_read(experts: int, k: int, store: type[plain.Base]) -> None:
    k = min(k, experts)
    block = plain.make(lambda: block_class(store, plain.OneHotLoop)(Sizes(experts=experts, k=k)))
    reading = read(block)
    assert (reading.spec.router.num_experts, reading.spec.router.top_k) == (experts, k)
    assert_reads_right(block, reading)


@LEAN
@given(COUNTS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_count_of_experts_alone_is_read(experts: int, dtype: torch.dtype) -> None:
    module = plain.make(lambda: ExpertsAlone(experts), dtype=dtype)
    spec = read_experts(module).spec
    assert (spec.at, spec.experts.num_experts, spec.router.num_experts) == ("experts", experts, experts)


class Float32Matrix(plain.SoftmaxFirst):
    """A router that is computed in float32, as the trainers of several models keep it."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), self.gate.weight.float())


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@LEAN
@given(DTYPES, DTYPES, st.sampled_from([plain.Packed, plain.ListOfMLPs]))
def test_a_router_may_have_another_dtype(router: torch.dtype, rest: torch.dtype, store: type[plain.Base]) -> None:
    block: Any = plain.make(block_class(Float32Matrix, store), dtype=rest)
    block.gate.to(router)
    if router not in (torch.float32, rest):
        with pytest.raises(Unreadable, match=str(router).removeprefix("torch.")):
            read(block)
        return
    reading = read(block)
    assert reading.spec.router.wide_matrix == (router != rest)
    plain_spec = replace(reading.spec, router=replace(reading.spec.router, wide_matrix=False))
    assert plain_spec == read(plain.make(block_class(Float32Matrix, store))).spec
    assert_reads_right(block, reading)


@pytest.mark.parametrize("target", ["vllm", "reference"])
def test_a_float32_router_of_a_bfloat16_block_stays_float32(target: str) -> None:
    block: Any = plain.make(block_class(Float32Matrix), dtype=torch.bfloat16)
    block.gate.float()
    with torch.no_grad():  # what bfloat16 would round away decides
        block.gate.weight += 2.0**-9 * torch.randn(block.gate.weight.shape)
    model, x = Holder(block), torch.randn(3, 20, 32).bfloat16()
    with torch.no_grad():
        before = model(x)
    report = moe_surgery.apply(model, target=target)
    assert [step.outcome for step in report.steps] == ["replaced"]
    assert "by a float32 router" in report.steps[0].reason
    with torch.no_grad():
        assert distance(model(x), before) < 8
    if target == "vllm":
        with pytest.raises(moe_surgery.SurgeryError, match="can't go from torch.float32"):
            model.to(torch.bfloat16)


class Around(plain.Base):
    def make_more(self) -> None:
        self.norm = nn.LayerNorm(self.hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + super().forward(self.norm(hidden_states))


@settings(LEAN, max_examples=4)  # each is recorded a dozen times
@given(st.one_of(st.integers(1, 24), st.just(128)), st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_experts_of_any_count_are_found_in_the_middle_of_a_block(experts: int, k: int, dtype: torch.dtype) -> None:
    make = block_class(Around, plain.Packed, plain.OneHotLoop)
    spec = read_within(plain.make(lambda: make(Sizes(experts=experts, k=min(k, experts))), dtype=dtype)).spec
    assert spec.own_rest and spec.experts.num_experts == experts and spec.router.top_k == min(k, experts)


def test_experts_of_two_dtypes_are_left_alone_for_that_reason() -> None:
    block: Any = plain.make(block_class(plain.Packed), dtype=torch.bfloat16)
    block.down_proj = nn.Parameter(block.down_proj.float(), requires_grad=False)
    model = Holder(block)
    [step] = moe_surgery.apply(model).steps
    assert step.outcome == "missed"
    assert model.mlp is block


def test_the_reason_is_the_one_that_decided_of_the_block_and_of_its_experts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = plain.linear(32, 8), Twice(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, 32)
            weights, ids = self.gate(flat).tanh().topk(2, dim=-1)
            return self.experts(flat, ids, weights).reshape(x.shape)

    class Twice(ExpertsAlone):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return super().forward(x, ids, weights).sin() * x.amax()  # more than can go on as it is

    [step] = moe_surgery.plan(Holder(plain.make(Block))).steps
    assert step.outcome == "missed"
    block, experts = step.reason.split("; nor its experts alone (experts): ")
    assert "sin" in block and "sin" in experts
