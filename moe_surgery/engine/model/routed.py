"""vLLM's routed layer in a block: which it is, how it chooses experts, and what it must not do for a swap."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import Activation

Routes = Literal["softmax", "own", "given"]
"""How a routed layer chooses experts: plain softmax top-k, in a way of its own, or by ids and weights handed to it."""

ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": ("silu", F.silu),
    "gelu": ("gelu", F.gelu),
    "gelu_tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
}


@dataclass(frozen=True, eq=False)
class Routed:
    """vLLM's routed layer in a block: its path there, the layer, and how it chooses experts."""

    path: str
    runner: MoERunner
    routes: Routes


def stored(layer: nn.Module) -> str | None:
    """The method by which one of vLLM's layers holds quantised weights; None where it holds them as they are."""
    method = type(layer.quant_method)
    plain = (UnquantizedFusedMoEMethod, UnquantizedLinearMethod)
    return None if method in plain else method.__name__


def routed_layers(block: nn.Module) -> list[tuple[str, MoERunner]]:
    """Every routed layer of vLLM's in a block, by path."""
    return [(path, module) for path, module in block.named_modules() if isinstance(module, MoERunner)]


def find_routed(block: nn.Module) -> Routed | None:
    """The one routed layer of a block; raises :class:`Unreadable` for more, or for one that computes something else."""
    found = routed_layers(block)
    if not found:
        return None
    if len(found) > 1:
        raise Unreadable(f"it has {len(found)} routed layers: {', '.join(path for path, _ in found)}")
    path, runner = found[0]
    _check_runner(runner)
    return Routed(path, runner, _routes(runner))


def _check_runner(runner: MoERunner) -> None:
    """Refuse what a routed layer may compute beyond its experts' weighted sum."""
    experts, config = runner.routed_experts, runner.moe_config
    if experts.activation.value not in ACTIVATIONS:
        raise Unreadable(f"its experts' activation is {experts.activation.value}")
    held = {
        "a transform around its routed experts": runner.routed_input_transform or runner.routed_output_transform,
        "a gate for the shared expert inside its routed layer": runner.shared_expert_gate,
        "biases in its experts": config.has_bias,
        "a clamp in its experts": experts.swiglu_limit or experts.swiglu_alpha or experts.swiglu_beta,
        "router weights on its experts' inputs": experts.apply_router_weight_on_input,
        "zero experts": isinstance(runner.router, ZeroExpertRouter),
        "hash routing": getattr(runner.router, "_hash_indices_table", None) is not None,
    }
    for what, value in held.items():
        if value:
            raise Unreadable(f"it has {what}")
    inside: Any = runner.shared_experts
    if inside is not None and (
        type(inside) is not SharedExperts or _patched(inside) or inside._forward_hooks or inside._forward_pre_hooks
    ):
        raise Unreadable("its routed layer calls the shared expert in a way of its own")
    more = (name for name in _patched(runner) if name != "forward")
    if own := [*more, *_patched(experts), *_patched(experts.quant_method)]:
        raise Unreadable(f"its routed layer has a method of its own ({own[0]})")


def _patched(layer: Any) -> list[str]:
    """The methods of a layer's class in whose place something else stands on the layer itself."""
    return [
        name for name, value in vars(layer).items() if callable(value) and callable(getattr(type(layer), name, None))
    ]


def _routes(runner: MoERunner) -> Routes:
    if type(runner) is not MoERunner:  # of the Transformers backend: ids and weights come from the model's own router
        if type(runner).__name__ != "TransformersMoERunner":
            raise Unreadable(f"its routed layer is a {type(runner).__name__}")
        return "given"
    experts = runner.routed_experts
    plain = experts.scoring_func == "softmax" and not experts.use_grouped_topk
    plain = plain and correction_bias(runner) is None and experts.custom_routing_function is None
    return "softmax" if plain and _as_it_says(runner) else "own"


def _as_it_says(runner: MoERunner) -> bool:
    """Whether a plain router is vLLM's, with what its layer says of it; else it is only known by asking it."""
    router: Any = runner.router
    if type(router).__module__.split(".")[0] != "vllm" or _patched(router):
        return False
    said = runner.moe_config.experts_per_token, runner.routed_experts.renormalize
    return bool((getattr(router, "top_k", None), getattr(router, "renormalize", None)) == said)


def correction_bias(runner: MoERunner) -> Tensor | None:
    """The correction bias that a router adds to scores before it chooses."""
    bias: Tensor | None = runner.routed_experts.e_score_correction_bias
    return bias


def routing(routed: Routed, block: nn.Module) -> Hashable:
    """What a routed layer's forward depends on beside its weights."""
    runner, experts = routed.runner, routed.runner.routed_experts
    held = (runner.gate, shared_inside(runner))
    places = tuple(next((path for path, module in block.named_modules() if module is each), None) for each in held)
    chosen = (routed.routes, runner.moe_config.experts_per_token, experts.renormalize, runner.routed_scaling_factor)
    return *chosen, *places, experts.activation.value, parts_of(runner)


def shared_inside(runner: MoERunner) -> nn.Module | None:
    """The shared expert that a routed layer computes with its own, if it does."""
    inside = runner.shared_experts
    layer: nn.Module | None = None if inside is None else inside._layer
    return layer


def choose(router: Any, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a router of vLLM's makes of tokens [T, H] and logits [T, E]: weights [T, k] and expert ids [T, k] int32."""
    weights, ids = router.select_experts(
        hidden_states=x, router_logits=logits.contiguous(), topk_indices_dtype=torch.int32
    )
    return weights, ids


def matrices(runner: MoERunner) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's share of all experts, without what fills it up: gate and up [E, width, H], down [E, H, width].

    Views of the layer's weights, as long as they aren't in a kernel's layout.
    """
    config, experts = runner.moe_config, runner.routed_experts
    width, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    w13, w2 = experts.w13_weight.data, experts.w2_weight.data
    half = w13.shape[1] // 2
    return w13[:, :width, :hidden], w13[:, half : half + width, :hidden], w2[:, :hidden, :width]


def parts_of(runner: MoERunner) -> int:
    """Over how many ranks a routed layer leaves its sum to others: each has a part of every expert, or some experts."""
    config = runner.moe_config
    return int(config.tp_size * config.ep_size) if config.skip_final_all_reduce else 1
