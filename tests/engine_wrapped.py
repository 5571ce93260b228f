"""Modules that stand around an engine's layers once it is built, as the wrappers of adapters do.

The real ones need a GPU: on a CPU vLLM has no routed layer that takes adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Wrapped(nn.Module):
    """A linear layer with an adapter: what the layer answers, and a part of it once more."""

    def __init__(self, base_layer: nn.Module, part: float) -> None:
        super().__init__()
        self.base_layer, self.part = base_layer, part

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out, bias = self.base_layer(x)
        return out * (1 + self.part), bias


def wrap(model: nn.Module, names: tuple[str, ...]) -> int:
    """Put one around every layer whose path ends in one of ``names``, as vLLM does; how many there were."""
    from vllm.lora.utils import replace_submodule

    found = [(path, module) for path, module in model.named_modules() if path.endswith(names)]
    for number, (path, module) in enumerate(found):
        replace_submodule(model, path, Wrapped(module, 0.1 + 0.02 * number))
    return len(found)
