"""Eras B to D: a layer whose forward returns the sum of routed and shared output.

It is a ``MoERunner``, which holds the routed experts, or before 0.24 a ``FusedMoE``, which is them itself.

This module imports vLLM; :mod:`moe_surgery.targets.vllm.eras` names it and nothing else imports it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular
from vllm.platforms import current_platform

from moe_surgery.spec import ExpertsSpec, Mix, MoESpec
from moe_surgery.targets.routing import Handed, Routing
from moe_surgery.targets.shared_as_experts import cut
from moe_surgery.targets.vllm.folded_routing import FoldedRouting, folded
from moe_surgery.targets.vllm.host import hosting
from moe_surgery.targets.vllm.in_place import LaidOutInPlace
from moe_surgery.targets.vllm.shared import SharedExpert
from moe_surgery.weights.tensors import BlockTensors


class FusedLayer(nn.Module):
    """vLLM's layer with its weights in the kernels' layout, and the forward context it runs in.

    The layer's parameters are made on the meta device and replaced by ``tensors``, so nothing is allocated only to be
    overwritten. The CPU kernels then write re-laid-out copies; ``tensors`` stay as they are. With ``fold`` the shared
    expert is among the layer's routed ones, and those copies are laid out in place.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors, prefix: str, *, fold: bool = False) -> None:
        super().__init__()
        shared = SharedExpert(spec.shared, tensors) if spec.shared is not None and not fold else None
        with hosting(tensors.w13.device.type) as config:
            with torch.device("meta"):
                routing = routing_of(spec, tensors)
                self.runner = construct(
                    folded(spec) if fold else spec,
                    tensors.w13.dtype,
                    f"{prefix}.experts",
                    shared,
                    FoldedRouting.of(spec, routing) if fold else routing,
                    **_ALONE,
                )
            experts: Any = getattr(self.runner, "routed_experts", self.runner)
            w13, w13_bias, w2 = tensors.w13, tensors.w13_bias, tensors.w2
            if fold:
                more = cut(tensors, spec)
                w13, w2 = torch.cat([w13, more[0]]), torch.cat([w2, more[1]])
            if kernel_activation(spec.experts) == _INTERLEAVED:
                w13, w13_bias = interleaved(w13), None if w13_bias is None else interleaved(w13_bias)
            chosen = experts.quant_method.experts_cls
            if fold and _in_parts(chosen):  # others, before 0.30, take more of the layer than its weights
                experts.quant_method.experts_cls = type(f"{chosen.__name__}InPlace", (LaidOutInPlace, chosen), {})
            experts.w13_weight = nn.Parameter(w13, requires_grad=False)
            experts.w2_weight = nn.Parameter(w2, requires_grad=False)
            if w13_bias is not None and tensors.w2_bias is not None:
                experts.w13_bias = nn.Parameter(w13_bias.clone(), requires_grad=False)
                experts.w2_bias = nn.Parameter(tensors.w2_bias.clone(), requires_grad=False)
            if kernel_activation(spec.experts) is None:
                # Imported where it is needed: it registers an operator, which takes long, and engines never use it.
                from moe_surgery.targets.vllm.experts_in_turn import ExpertsInTurn

                experts.quant_method.experts_cls = type("ExpertsInTurn", (ExpertsInTurn,), {"spec": spec.experts})
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


_INTERLEAVED = "swigluoai"
_KERNELS: dict[Mix, str] = {
    Mix("silu"): "silu",
    Mix("gelu"): "gelu",
    Mix("gelu_tanh"): "gelu_tanh",
    Mix("silu", limit=7.0, alpha=1.702, offset=1.0): _INTERLEAVED,  # the kernel's constants; it takes no others
}


def kernel_activation(experts: ExpertsSpec) -> str | None:
    """What the CPU kernels call the function of these experts; None if they have none for it.

    vLLM's clamp, alpha and offset arguments aren't used: on CPU 0.32 takes them and computes without.
    """
    return _KERNELS.get(experts.mix) if experts.weights_on == "output" else None


def interleaved(w13: Tensor) -> Tensor:
    """Gate and up rows [E, 2I, ...] taken in turn, as the kernel of "swigluoai" wants them."""
    return w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def routing_of(spec: MoESpec, tensors: BlockTensors) -> Routing | Handed:
    """The routing function of a whole block, or of experts alone."""
    if spec.at == "experts":
        return Handed()
    return Routing(spec.router, tensors.w13.dtype, tensors.correction_bias)


def _free(runner: nn.Module) -> None:
    """Let go of a layer's weights."""
    for module in runner.modules():
        module._parameters.clear()


_ALONE: dict[str, Any] = {"tp_size": 1, "dp_size": 1, "pcp_size": 1}


def platform() -> str:
    """The device type that the installed vLLM was built for."""
    return str(current_platform.device_type)


def check(spec: MoESpec, device: str, dtype: torch.dtype) -> None:
    """Raise what vLLM raises if it has no kernel for ``spec``; allocates nothing."""
    if kernel_activation(spec.experts) is None:
        _check_in_turn()
    with hosting(device), torch.device("meta"):
        construct(spec, dtype, "probe.experts", None, **_ALONE)


def _check_in_turn() -> None:
    """Raise where nothing can compute in the place of the kernels, as they choose experts themselves (before 0.30)."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if not _in_parts(getattr(cpu_moe, "CPUUnquantizedExperts", None)):
        raise NotImplementedError("they have no function for these experts, and choose experts themselves")


def _in_parts(experts: type | None) -> bool:
    """Whether experts are given ids and weights, rather than the router's logits."""
    return experts is not None and issubclass(experts, FusedMoEExpertsModular)


def construct(
    spec: MoESpec,
    dtype: torch.dtype,
    name: str,
    shared: nn.Module | None,
    routing: Routing | Handed | FoldedRouting | None = None,
    **sizes: Any,
) -> Any:
    """vLLM's layer for ``spec``, registered as ``name`` in the current config, its weights empty.

    Without ``sizes`` of the parallel groups vLLM asks its own groups for them.
    """
    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE  # its name before 0.27
    return make(
        num_experts=spec.experts.num_experts,
        top_k=spec.router.top_k,
        hidden_size=spec.hidden,
        intermediate_size=spec.experts.width,
        params_dtype=dtype,
        activation=kernel_activation(spec.experts) or "silu",
        has_bias=spec.experts.biases,
        renormalize=spec.router.renormalize,
        custom_routing_function=routing or Routing(spec.router, dtype),
        shared_experts=shared,
        prefix=name,
        **sizes,
    )
