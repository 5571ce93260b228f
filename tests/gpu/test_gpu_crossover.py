"""A block in an engine on both sides of the crossover to vLLM's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from folded_blocks import SPEC, clear_tokens
from spec_weights import tolerance, weights, worst

from moe_surgery.spec import MoESpec
from moe_surgery.targets import reference
from moe_surgery.targets.folded.fold import fold, terms_of

pytest.importorskip("vllm")

SPECS = {
    "shared, gated": SPEC,
    "shared": replace(SPEC, shared=replace(SPEC.shared, gate=None, scale=0.5)),  # type: ignore[type-var]
    "none shared": replace(SPEC, shared=None),
    "sigmoid": replace(SPEC, router=replace(SPEC.router, scoring="sigmoid", ranks="scores", scale=1.5)),
}


@pytest.fixture
def crossing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operator's module, with a table in which vLLM's experts are the faster ones from 16 tokens."""
    from moe_surgery.engine.model import crossing_op

    def choose(terms: Any, tokens: int, dtype: torch.dtype) -> Any:
        return replace(known(terms, tokens, dtype), slower=tokens >= 16)

    known = crossing_op.choose
    monkeypatch.setattr(crossing_op, "choose", choose)
    return crossing_op


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("merged", [False, True], ids=["two matrices", "one matrix"])
def test_both_sides_compute_the_spec(spec: MoESpec, merged: bool, crossing: Any) -> None:
    dtype = torch.bfloat16
    tensors, terms = weights(spec, dtype, device="cuda"), terms_of(spec)
    held = fold(tensors)
    if merged and held.shared_gate is not None and held.shared_up is not None:
        held = replace(held, shared_gate=torch.cat([held.shared_gate, held.shared_up]), shared_up=None)
    for tokens in (3, 15, 16, 40):
        x = clear_tokens(spec, tensors, tokens)
        truth = reference.forward(spec, tensors, x, torch.float64)
        with torch.no_grad():
            ours, crossed = crossing.compute(x, held, terms), crossing.compute_in_engine(x, held, terms)
            traced = torch.compile(crossing.engine_moe, fullgraph=True)(x, held, terms)
        # vLLM's kernels round once more on the way.
        assert worst(crossed, truth) < 2 * tolerance(spec, dtype)
        assert torch.equal(crossed, ours) == (tokens < 16)
        assert torch.equal(traced, crossed)


def test_a_graph_records_either_side(crossing: Any) -> None:
    tensors, terms = weights(SPEC, torch.bfloat16, device="cuda"), terms_of(SPEC)
    held = fold(tensors)
    for tokens in (8, 64):
        x = torch.randn(tokens, SPEC.hidden, device="cuda", dtype=torch.bfloat16)
        wanted = crossing.compute_in_engine(x, held, terms)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = crossing.compute_in_engine(x, held, terms)
        for _ in range(20):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, wanted)
