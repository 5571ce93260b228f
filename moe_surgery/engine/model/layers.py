"""Linear layers of an engine's model, vLLM's or plain: who holds a weight, on how many ranks, what a call gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear

from moe_surgery.weights.layout import Piece


@dataclass(frozen=True, eq=False)
class Held:
    """A weight by the module that owns it: vLLM exchanges the parameters themselves."""

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.name)
        return weight


def owner(block: nn.Module, piece: Piece) -> nn.Module:
    """The module that holds a weight."""
    return block.get_submodule(owner_path(piece))


def owner_path(piece: Piece) -> str:
    return piece.path.rpartition(".")[0]


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (LinearBase, nn.Linear))


def copies(layer: nn.Module) -> int:
    """How many ranks hold the same whole weight of ``layer``."""
    # A replicated layer has the ranks' number too, so its class decides.
    shared_out = isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer.tp_size > 1
    return 1 if shared_out else ranks()


def ranks() -> int:
    return int(get_tensor_model_parallel_world_size())


Sums = tuple[bool, bool]
"""Whether a routed layer leaves its sum over the ranks to others, and a shared expert's last layer does its own."""


def sums_of(runner: Any, down: Any) -> Sums:
    """Which sums a block's routed layer and the last layer of its shared expert do; ``down`` may be None."""
    return bool(runner.moe_config.skip_final_all_reduce), bool(getattr(down, "reduce_results", True))


def set_sums(runner: Any, down: Any, sums: Sums) -> None:
    """Have the two do the ``sums`` that :func:`sums_of` found."""
    runner.moe_config.skip_final_all_reduce, reduces = sums
    if hasattr(down, "reduce_results"):
        down.reduce_results = reduces


def first(result: Any) -> Tensor:
    """vLLM's linear layers return their output and a bias, plain ones their output alone."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
