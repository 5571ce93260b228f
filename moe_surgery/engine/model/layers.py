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


def first(result: Any) -> Tensor:
    """vLLM's linear layers return their output and a bias, plain ones their output alone."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
