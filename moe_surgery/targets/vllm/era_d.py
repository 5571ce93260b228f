"""Era D: ``FusedMoEFactory`` builds a ``MoERunner`` whose forward returns the sum of routed and shared output.

This module imports vLLM; :mod:`moe_surgery.targets.vllm.eras` names it and nothing else imports it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.platforms import current_platform

from moe_surgery.spec import MoESpec
from moe_surgery.targets.vllm.host import hosting
from moe_surgery.targets.vllm.routing import Routing
from moe_surgery.targets.vllm.shared import SharedExpert
from moe_surgery.weights.tensors import BlockTensors


class FusedLayer(nn.Module):
    """vLLM's layer with its weights in the kernels' layout, and the forward context it runs in.

    The layer's parameters are made on the meta device and replaced by ``tensors``, so nothing is allocated only to be
    overwritten. The CPU kernels then write re-laid-out copies; ``tensors`` stay as they are.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors, prefix: str) -> None:
        super().__init__()
        shared = SharedExpert(spec.shared, tensors) if spec.shared is not None else None
        with hosting(tensors.w13.device.type) as config:
            with torch.device("meta"):
                self.runner = construct(spec, tensors.w13.dtype, f"{prefix}.experts", shared, **_ALONE)
            experts = self.runner.routed_experts
            experts.w13_weight = nn.Parameter(tensors.w13, requires_grad=False)
            experts.w2_weight = nn.Parameter(tensors.w2, requires_grad=False)
            experts.quant_method.process_weights_after_loading(experts)
            self._context = create_forward_context(None, config)
        # vLLM's layer refers to itself in a circle, and a collection may be long in coming for this much memory.
        weakref.finalize(self, _free, self.runner).atexit = False

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Tokens [T, H], contiguous, and router logits [T, E] to [T, H]."""
        try:
            with override_forward_context(self._context):
                out: Tensor = self.runner(hidden_states=x, router_logits=logits)
        except BaseException:
            drop_shared_output(self.runner)
            raise
        return out


def drop_shared_output(runner: Any) -> None:
    """Make a layer fit for use again after a forward that was interrupted.

    The shared output is parked on the layer until the routed one is there; a leftover would fail every later forward.
    """
    if runner.shared_experts is not None:
        runner.shared_experts._output = [None, None]


def _free(runner: nn.Module) -> None:
    """Let go of a layer's weights."""
    for module in runner.modules():
        module._parameters.clear()


_ALONE = {"tp_size": 1, "dp_size": 1, "pcp_size": 1}


def platform() -> str:
    """The device type that the installed vLLM was built for."""
    return str(current_platform.device_type)


def check(spec: MoESpec, device: str, dtype: torch.dtype) -> None:
    """Raise what vLLM raises if it has no kernel for ``spec``; allocates nothing."""
    with hosting(device), torch.device("meta"):
        construct(spec, dtype, "probe.experts", None, **_ALONE)


def construct(spec: MoESpec, dtype: torch.dtype, name: str, shared: nn.Module | None, **sizes: int) -> Any:
    """vLLM's layer for ``spec``, registered as ``name`` in the current config, its weights empty.

    Without ``sizes`` of the parallel groups vLLM asks its own groups for them.
    """
    return FusedMoEFactory(
        num_experts=spec.experts.num_experts,
        top_k=spec.router.top_k,
        hidden_size=spec.hidden,
        intermediate_size=spec.experts.width,
        params_dtype=dtype,
        activation=spec.experts.activation,
        renormalize=spec.router.renormalize,
        custom_routing_function=Routing(spec.router, dtype),
        shared_experts=shared,
        prefix=name,
        **sizes,
    )
