"""The blocks that the GPU benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec


def _spec(hidden: int, experts: int, width: int, top_k: int, shared: int, gate: bool, renormalize: bool) -> MoESpec:
    return MoESpec(
        hidden=hidden,
        router=RouterSpec(num_experts=experts, top_k=top_k, scoring="softmax", renormalize=renormalize),
        experts=ExpertsSpec(num_experts=experts, width=width, activation="silu"),
        shared=SharedSpec(width=shared, activation="silu", gate="sigmoid" if gate else None) if shared else None,
    )


@dataclass(frozen=True)
class Case:
    """A block's spec, and how many layers of random weights stand for a model that doesn't fit into the L2 cache."""

    spec: MoESpec
    layers: int


CASES = {
    "talker": Case(_spec(1024, 128, 384, 6, 768, True, True), 16),
    "thinker": Case(_spec(2048, 128, 768, 8, 0, False, True), 6),
    "qwen2-57b-a14b": Case(_spec(3584, 64, 2560, 8, 20480, True, False), 3),
    "deepseek-v2-lite": Case(_spec(2048, 64, 1408, 6, 2816, False, False), 6),
    "unfused-deepseek": Case(_spec(1024, 64, 256, 4, 512, False, True), 24),
    "talker-tp2": Case(_spec(1024, 128, 192, 6, 384, True, True), 24),
    "qwen3-next": Case(_spec(2048, 512, 512, 10, 512, True, True), 3),
    "deepseek-v3-tp8": Case(_spec(7168, 256, 256, 8, 256, False, True), 3),
    "kimi-k2-tp8": Case(_spec(7168, 384, 256, 8, 256, False, True), 3),
    "glm-4.5-air": Case(_spec(4096, 128, 1408, 8, 1408, False, True), 3),
    "gpt-oss-20b": Case(_spec(2880, 32, 2880, 4, 0, False, True), 3),
    "minimax-m2": Case(_spec(3072, 256, 1536, 8, 0, False, True), 2),
    "mixtral-8x7b": Case(_spec(4096, 8, 14336, 2, 0, False, True), 3),
}
"""Qwen3-Omni's talker and thinker (the size of Qwen3-30B-A3B), Qwen2-57B-A14B, DeepSeek-V2-Lite, and more: a rank's
share where it says so; ``unfused-deepseek`` is what served_checkpoint.py writes. The sizes are the models' own; every
router is a plain one here, and biases are left out."""
