"""The ``vllm`` target: the installed vLLM's shared-fused MoE layer, hosted in a plain model without an engine.

Importing this package doesn't import vLLM; asking whether a spec is accepted does.
"""

from moe_surgery.targets.vllm.target import VllmTarget

__all__ = ["VllmTarget"]
