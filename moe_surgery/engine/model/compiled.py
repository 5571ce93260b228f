"""Having the kernels of an engine's blocks compiled before anything waits for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.platforms import current_platform

from moe_surgery.engine.model.kernel_block import KernelBlock, terms_in_engine
from moe_surgery.engine.model.planning import AUTO, FOLDED
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.engine.orders import Orders

if TYPE_CHECKING:
    from moe_surgery.kernels.ahead import Compilers

MOST = 16
"""Processes that compile; each imports Triton first, so that more would bring little."""


def compilers(orders: Orders) -> Compilers | None:
    """What compiles in other processes, which make themselves ready while a model is built; None if nothing is folded.

    The caller ends it.
    """
    if not current_platform.is_cuda() or orders.target not in (AUTO, FOLDED):
        return None
    from moe_surgery.kernels.ahead import Compilers

    cores = (os.cpu_count() or 1) // int(get_tensor_model_parallel_world_size())
    return Compilers(torch.device("cuda", torch.cuda.current_device()), min(MOST, max(1, 3 * cores // 4)))


def compile_ahead(items: Iterable[EngineSite], config: VllmConfig, compilers: Compilers | None) -> Callable[[], None]:
    """Begin to compile what :func:`warm_kernels` will want for these blocks once they are built.

    Returns what waits for it.
    """
    terms = list(dict.fromkeys(map(terms_in_engine, items)))
    if compilers is None:
        return lambda: None
    if not terms:
        compilers.end()
        return lambda: None
    assert config.model_config is not None
    return compilers.begin(terms, config.model_config.dtype)


def warm_kernels(model: nn.Module) -> None:
    """Compile all that the blocks of ``model`` may ever launch: an engine's own warm-up meets some sizes only."""
    blocks = {block.terms: block for block in model.modules() if isinstance(block, KernelBlock)}
    for terms, block in blocks.items():
        from moe_surgery.kernels.warming import warm

        warm(block.weights(), terms)
