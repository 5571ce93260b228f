"""What of a block the lens hides from reading: second names of one layer, and what its routed layer alone uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

Hidden = tuple[nn.Module, dict[str, Any]]
"""A module, and the attributes under which it is as before, but that something in it isn't listed any more."""


def hidden_in(block: nn.Module, bias: Tensor | None) -> list[Hidden]:
    """All that is to be hidden in a ``block`` whose router has the correction ``bias``."""
    return [*_without_bias(block, bias), *_once_named(block)]


def _once_named(block: nn.Module) -> Iterator[Hidden]:
    """The modules that hold one of vLLM's linear layers which another has before, and attributes that hide it in them.

    It is one layer, called by either name; its weights have one name then.
    """
    seen: set[nn.Module] = set()
    waiting = [block]
    while waiting:
        holder = waiting.pop()
        known = {name for name, child in holder._modules.items() if child in seen and isinstance(child, LinearBase)}
        new = [child for child in holder._modules.values() if child is not None and child not in seen]
        seen.update(new)
        waiting += reversed(new)
        if known:
            left = {name: child for name, child in holder._modules.items() if name not in known}
            yield holder, {"_modules": left} | {name: holder._modules[name] for name in known}


def _without_bias(block: nn.Module, bias: Tensor | None) -> Iterator[Hidden]:
    """The modules that hold a router's correction bias, which only the routed layer uses, and what hides it in them."""
    for module in block.modules():
        names = {name for name, parameter in module._parameters.items() if bias is not None and parameter is bias}
        if names and not isinstance(module, (LinearBase, RoutedExperts)):
            left = {name: parameter for name, parameter in module._parameters.items() if name not in names}
            yield module, {"_parameters": left} | dict.fromkeys(names, bias)
