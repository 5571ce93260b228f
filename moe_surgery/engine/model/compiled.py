"""Having the kernels of an engine's blocks compiled before anything waits for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from moe_surgery.engine.model.kernel_block import KernelBlock, terms_in_engine
from moe_surgery.engine.model.sites import EngineSite

MOST = 16
"""Processes that compile; each imports Triton first, so that more would bring little."""


def compile_ahead(items: Iterable[EngineSite], config: VllmConfig) -> Callable[[], None]:
    """Begin to compile, in other processes, what :func:`warm_kernels` will want for these blocks once they are built.

    Returns what waits for it.
    """
    terms = list(dict.fromkeys(map(terms_in_engine, items)))
    if not terms:
        return lambda: None
    from moe_surgery.kernels.ahead import begin

    assert config.model_config is not None
    cores = (os.cpu_count() or 1) // int(get_tensor_model_parallel_world_size())
    return begin(
        terms,
        config.model_config.dtype,
        torch.device("cuda", torch.cuda.current_device()),
        min(MOST, max(1, cores // 2)),
    )


def warm_kernels(model: nn.Module) -> None:
    """Compile all that the blocks of ``model`` may ever launch: an engine's own warm-up meets some sizes only."""
    blocks = {block.terms: block for block in model.modules() if isinstance(block, KernelBlock)}
    for terms, block in blocks.items():
        from moe_surgery.kernels.warming import warm

        warm(block.weights(), terms)
