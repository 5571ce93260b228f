"""The folded block on a GPU: its guards, and that graphs and torch.compile take it as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folded_blocks import ROUTED, SPEC
from launch_paths import IN_E4M3, terms_in_e4m3
from spec_weights import weights
from stored_blocks import BLOCKS, GATED, ROWS, held, stored_weights
from torch import Tensor

from moe_surgery.errors import GradientError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.target import FoldedTarget

REPLAYS = 10_000

in_e4m3 = pytest.mark.skipif(not IN_E4M3, reason="needs products of e4m3")


def test_the_block_keeps_its_guards_and_its_input() -> None:
    block = FoldedTarget().build(SPEC, weights(SPEC, torch.bfloat16, device="cuda"), prefix="mlp")
    x = torch.randn(2, 3, SPEC.hidden, device="cuda", dtype=torch.bfloat16)
    copy = x.clone()
    with torch.no_grad():
        assert block(x).shape == x.shape and torch.equal(x, copy)
        assert block(x[:, :0]).shape == (2, 0, SPEC.hidden)
        shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
        assert torch.equal(block(shifted), block(x))
    with pytest.raises(GradientError, match="this library's MoE kernels have no backward pass"):
        block(x.requires_grad_())


def replayed(call: Callable[[Tensor], Tensor], tokens: int, hidden: int) -> int:
    """How many numbers of all replays are others than those without a graph."""
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    different = torch.zeros((), dtype=torch.long, device="cuda")
    with torch.no_grad():
        wanted = call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x)
        for _ in range(REPLAYS):
            out.fill_(torch.nan)
            graph.replay()
            different += (out != wanted).sum()
    return int(different)


@pytest.mark.parametrize("spec", [SPEC, ROUTED["correction bias and groups"]], ids=["one operator", "behind a router"])
@pytest.mark.parametrize("tokens", [1, 8, 32, 300])
def test_a_graph_gives_the_same_bits_every_time(tokens: int, spec: MoESpec) -> None:
    block = FoldedTarget().build(spec, weights(spec, torch.bfloat16, device="cuda"), prefix="mlp")
    assert replayed(block, tokens, spec.hidden) == 0


@in_e4m3
@pytest.mark.parametrize(("form", "tokens"), [(BLOCKS, 1), (BLOCKS, 8), (BLOCKS, 300), (ROWS, 1), (ROWS, 8)])
def test_a_graph_over_weights_in_e4m3_does_too(form: str, tokens: int) -> None:
    from moe_surgery.kernels.op import compute

    stored, terms = held(stored_weights(GATED, torch.bfloat16, "cuda", form)), terms_in_e4m3(form)
    assert replayed(lambda x: compute(x, stored, terms), tokens, terms.hidden) == 0


@pytest.mark.parametrize("spec", [SPEC, ROUTED["correction bias and groups"]], ids=["one operator", "behind a router"])
def test_compiles_into_one_graph(spec: MoESpec) -> None:
    block = FoldedTarget().build(spec, weights(spec, torch.bfloat16, device="cuda"), prefix="mlp")
    x = torch.randn(3, spec.hidden, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x), rtol=2**-7, atol=2**-7)
