"""However a block is changed, surgery computes what the changed block does, or lets it be, or ends the load."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from engine.make_checkpoint import make
from engine_variants import BUILT, CHECKPOINTS, LOADED, outcomes

# What becomes of each, and a word of the reason.
EXPECTED = {
    "as it is": ("replaced", ""),
    "shared expert twice": ("missed", "second shared expert"),
    "shared expert gated and ungated": ("missed", "second shared expert"),
    "extra residual": ("missed", "adds x"),
    "another input for the shared expert": ("missed", "not one linear map"),
    "a norm before the shared expert": ("missed", "multiplied by rsqrt"),
    "another token's shared expert": ("missed", "roll"),
    "a branch on the batch size": ("missed", "batch size"),
    "a scale on all": ("replaced", "×2.5"),
    "a gate on all": ("missed", "multiplied by sigmoid"),
    "experts called twice": ("missed", "ranks 2 times"),
    "logits times two": ("missed", "* 2"),
    "a scale in vLLM's layer": ("replaced", "top-2 of 8 ×2.5"),
    "a scale in vLLM's layer and on all": ("replaced", "top-2 of 8 ×6.25"),
    "a routed layer patched": ("missed", "MoERunner has a forward of its own"),
    "a router patched": ("missed", "ReplicatedLinear has a forward of its own"),
    "a shared gate patched": ("missed", "ReplicatedLinear has a forward of its own"),
    "an activation patched": ("missed", "SiluAndMul has a forward of its own"),
    "an activation of its own": ("missed", "Own has a forward of its own"),
    "a list": ("replaced", ""),
    "an expert's activation patched": ("missed", "SiluAndMul has a forward of its own"),
    "an expert's linear layer patched": ("missed", "RowParallelLinear has a forward of its own"),
    "a whole shared expert": ("replaced", "sigmoid gate"),
    "a whole shared expert over the ranks": ("replaced", "sigmoid gate"),
    "a whole shared expert in the sum": ("replaced", "sigmoid gate, ×2"),
    "a whole shared expert on one rank": ("failed", "the tensor-parallel ranks went different ways"),
    "a whole shared expert summed apart": ("replaced", "sigmoid gate"),
    "a sum left to the layer": ("replaced", "sigmoid gate, ×0.5"),
    "patched after loading": ("failed", "changed after it was read"),
    "a scale set after loading": ("failed", "changed after it was read"),
    "fused": ("replaced", "sigmoid gate"),
    "fused, and a residual": ("kept", "already fused · not folded: "),
    "fused, and scaled": ("replaced", "×2.5"),
    "fused, and the shared expert again": ("kept", "second shared expert"),
    "fused, of another input": ("kept", "2 * shared_expert_gate"),
    "fused, a scale in vLLM's layer": ("replaced", "top-2 of 8 ×2.5"),
    "fused, the shared expert called otherwise": ("kept", "calls the shared expert in a way of its own"),
    "fused, the shared expert called by another class": ("kept", "calls the shared expert in a way of its own"),
    "fused, its routed layer's method patched": ("kept", "a method of its own (_maybe_reduce_final_output)"),
    "fused, its experts' method patched": ("kept", "a method of its own (apply)"),
    "fused, the shared expert summed inside": ("replaced", "sigmoid gate, ×2"),
    "fused, a shared gate patched": ("kept", "ReplicatedLinear has a forward of its own"),
    "fused, patched after loading": ("failed", "changed after it was read"),
    "fused, normed otherwise after loading": ("failed", "changed after it was read"),
    "fused, hooked after loading": ("failed", "changed after it was read"),
}


@pytest.mark.slow
def test_no_change_of_a_block_is_lost_on_two_ranks(tmp_path: Path) -> None:
    for kind in sorted({kind for kind, _ in [*BUILT.values(), *LOADED.values()]} - set(CHECKPOINTS)):
        make(kind, tmp_path / kind, layers=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for found in outcomes(tmp_path, tmp_path, 2, port):
        assert {name: told["outcome"] for name, told in found.items()} == {
            name: outcome for name, (outcome, _) in EXPECTED.items()
        }
        for name, told in found.items():
            assert EXPECTED[name][1] in told["reason"], (name, told)
            assert told.get("apart", 0.0) < 1e-5, (name, told)
