"""What vLLM registers of every MoE layer, kept in step with the module tree.

A routed layer puts itself into ``static_forward_context`` under its name, and its name into the list
``static_all_moe_layers``, in which releases before 0.20 look layers up by *position*. A name may be taken only once, so
a layer that goes must be released before another is built under its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner

from moe_surgery.errors import SurgeryError


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Both registers as they were."""

    layers: dict[str, Any]
    order: list[str]


class LayerBook:
    """The registers of one engine's config. Entries of other kinds, such as attention's, are never touched."""

    def __init__(self, config: VllmConfig) -> None:
        compilation = config.compilation_config
        self._layers: dict[str, Any] = compilation.static_forward_context
        self._order: list[str] = getattr(compilation, "static_all_moe_layers", [])

    def snapshot(self) -> Snapshot:
        return Snapshot(dict(self._layers), list(self._order))

    def restore(self, snapshot: Snapshot) -> None:
        """Put both registers back, in their order; the objects that vLLM holds stay the same."""
        self._layers.clear()
        self._layers.update(snapshot.layers)
        self._order[:] = snapshot.order

    def release(self, block: nn.Module) -> None:
        """Take out every layer that stands in ``block``, found by identity, whatever it is registered as."""
        inside = {id(module) for module in block.modules()}
        for name in [name for name, layer in self._layers.items() if id(layer) in inside]:
            del self._layers[name]
            while name in self._order:
                self._order.remove(name)

    def arrange(self, model: nn.Module, before: Snapshot) -> None:
        """Bring the names that ``model`` added since ``before`` into the order of its module tree."""
        mine = [runner.layer_name for runner in _runners(model)]
        self._order[:] = [*before.order, *(name for name in mine if name in self._order)]

    def check(self, model: nn.Module, before: Snapshot) -> None:
        """Compare the book with the module tree.

        Raises :class:`SurgeryError` naming every layer that is missing, stale (registered but not in the tree) or out
        of order among those added since ``before``.
        """
        runners = {runner.layer_name: runner for runner in _runners(model)}
        problems = [
            f"{name} is not registered" if name not in self._layers else f"{name} is registered for another layer"
            for name, runner in runners.items()
            if self._layers.get(name) is not runner
        ]
        added = {name: layer for name, layer in self._layers.items() if name not in before.layers}
        problems += [
            f"{name} is registered, but not in the model"
            for name, layer in added.items()
            if isinstance(layer, MoERunner) and name not in runners
        ]
        order = self._order[len(before.order) :]
        if not problems and order != list(runners):
            problems.append(f"layers are listed as {', '.join(order)}, and run as {', '.join(runners)}")
        if problems:
            raise SurgeryError(f"vLLM's registers and the model disagree: {'; '.join(problems)}")


def _runners(model: nn.Module) -> list[MoERunner]:
    return [module for module in model.modules() if isinstance(module, MoERunner)]
