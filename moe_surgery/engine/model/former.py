"""A block that vLLM's layer computed all of, as it was: it comes back where the one in its place can't be proven.

So it is on a GPU, where the new block has all of its layers, and they lie as vLLM lays them out. Nothing else of it was
changed than what is put back here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner

from moe_surgery.engine.model.layers import Sums, owner, set_sums, sums_of
from moe_surgery.engine.model.sites import EngineSite


@dataclass(frozen=True, eq=False)
class Former:
    """The block at ``path``, its routed layer, the last layer of its shared expert, if it has one, and their sums."""

    path: str
    block: nn.Module
    runner: MoERunner
    down: Any
    sums: Sums

    @classmethod
    def of(cls, item: EngineSite) -> Former:
        """The block of ``item``, from which nothing was built yet."""
        assert item.routed is not None and item.reading is not None
        runner, shared = item.routed.runner, item.reading.layout.shared
        down: Any = None if shared is None else owner(item.block, shared.down)
        return cls(item.site.path, item.site.module, runner, down, sums_of(runner, down))

    def put_back(self, model: nn.Module, config: VllmConfig) -> dict[nn.Module, nn.Module]:
        """Into ``model``, in place of what was built from it; returns what took which module's place."""
        new = model.get_submodule(self.path)
        runner = next(module for module in new.modules() if isinstance(module, MoERunner))
        parent, _, name = self.path.rpartition(".")
        model.get_submodule(parent).register_module(name, self.block)
        config.compilation_config.static_forward_context[self.runner.layer_name] = self.runner
        set_sums(self.runner, self.down, self.sums)
        return {new: self.block, runner: self.runner}
