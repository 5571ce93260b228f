"""Making vLLM's own layers readable: while the lens is on, each computes what it means, in plain torch.

Reading records a block's forward on meta tensors. vLLM's layers end in kernels, return pairs and hold one rank's share
of a weight. Under the lens a layer known here runs a plain forward over weights of their full size, so that a block
reads the same on every rank; everything else in the block runs as it is. What is one rank's part of a sum counts as an
equal part of the whole, and a sum over n ranks as n times what is summed: so what every rank adds to a sum whole counts
n times, as it really does. A layer that means more than can be said in plain torch here is
:class:`~moe_surgery.read.reading.Unreadable`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe import GateLinear, MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from moe_surgery.engine.model.hidden import hidden_in
from moe_surgery.engine.model.layers import ranks
from moe_surgery.engine.model.routed import (
    ACTIVATIONS,
    Routed,
    correction_bias,
    find_routed,
    parts_of,
    routing,
    shared_inside,
    stored,
)
from moe_surgery.read.beside import Pair
from moe_surgery.read.reading import Unreadable

_LINEAR_FORWARDS = tuple(
    cls.forward
    for cls in (ReplicatedLinear, GateLinear, ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear)
)


@dataclass(frozen=True, eq=False)
class Seen:
    """A block under the lens: its routed layer, if it has one, and what each of vLLM's layers in it means now.

    ``stored`` are the methods by which layers in it hold quantised weights.
    """

    routed: Routed | None
    meanings: dict[nn.Module, Hashable]
    stored: tuple[str, ...]


@contextmanager
def readable(block: nn.Module) -> Iterator[Seen]:
    """While this lasts, ``block`` takes ``[..., H]`` and can be recorded.

    Raises :class:`~moe_surgery.read.reading.Unreadable` for a layer that has more to it. The block is put back as it
    was in any case.
    """
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    meanings: dict[nn.Module, Hashable] = {}
    forms: dict[str, None] = {}
    group = get_tp_group()
    try:
        routed = find_routed(block)
        # Asked before any attribute of the routed layer is stood in for.
        bias = None if routed is None else correction_bias(routed.runner)
        meaning = None if routed is None else routing(routed, block)
        for module in list(block.modules()):
            stand_in = _stand_in(module, block, routed, bias)
            if stand_in is not None:
                holds_weights = isinstance(module, (LinearBase, RoutedExperts))
                form = stored(module) if holds_weights else None
                if form is not None:
                    forms[form] = None
                meanings[module] = (_meaning(module, stand_in), form, meaning)
                saved.append((module, {name: vars(module).get(name, _ABSENT) for name in stand_in}))
                vars(module).update(stand_in)
        for holder, hidden in hidden_in(block, bias):
            saved.append((holder, {name: vars(holder).get(name, _ABSENT) for name in hidden}))
            vars(holder).update(hidden)
        if (routed is None or routed.routes != "given") and not _of_transformers(block):
            saved.append((block, {"forward": vars(block).get("forward", _ABSENT)}))
            vars(block)["forward"] = _flat(block.forward)
        vars(group)["all_reduce"] = lambda tensor: tensor if group.world_size == 1 else tensor * group.world_size
        yield Seen(routed, meanings, tuple(forms))
    finally:
        vars(group).pop("all_reduce", None)
        for module, attributes in reversed(saved):
            for name, value in attributes.items():
                if value is _ABSENT:
                    del vars(module)[name]
                else:
                    vars(module)[name] = value


_ABSENT = object()


def _flat(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Blocks written for vLLM take tokens [T, H]; reading asks with leading dimensions too."""

    def flat(hidden_states: Tensor) -> Tensor:
        return forward(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape)

    return flat


def _of_transformers(block: nn.Module) -> bool:
    """Whether a block is written for transformers, and so takes leading dimensions itself: some take nothing else."""
    written = block.block if isinstance(block, Pair) else block
    return type(written).__module__.split(".")[0] in ("transformers", "transformers_modules")


def _stand_in(module: nn.Module, block: nn.Module, routed: Routed | None, bias: Tensor | None) -> dict[str, Any] | None:
    """The attributes that make a known layer plain; None for any other module."""
    known = isinstance(module, (LinearBase, CustomOp, MoERunner))
    if known and ("forward" in vars(module) or (isinstance(module, CustomOp) and _overridden(module))):
        raise Unreadable(f"its {type(module).__name__} has a forward of its own")
    if isinstance(module, LinearBase):
        return _linear(module, bias)
    if isinstance(module, CustomOp):
        return {"forward": module.forward_native}
    if routed is None:
        return None
    if module is routed.runner:
        return _runner(routed, block)
    if module is routed.runner.routed_experts:
        return _experts(routed.runner)
    return None


def _overridden(module: CustomOp) -> bool:
    """Whether a layer's class does more than choose between the forwards that all such layers have."""
    return type(module).forward is not CustomOp.forward


def _meaning(module: nn.Module, stand_in: dict[str, Any]) -> Hashable:
    """All that a stand-in's forward depends on beside the elements of its weights, and the routing."""
    weights = tuple((name, tuple(p.shape), p.dtype) for name, p in stand_in.get("_parameters", {}).items())
    more: tuple[Hashable, ...] = tuple(stand_in.get("_modules", ()))
    if isinstance(module, LinearBase):
        more = (
            getattr(module, "out_dtype", None),
            module.return_bias,
            module.tp_size,
            getattr(module, "reduce_results", True),
        )
    elif isinstance(module, CustomOp):  # runs a forward of its own
        more = tuple(item for item in sorted(vars(module).items()) if _is_plain(item[1]))
    return type(module), weights, more


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _linear(module: LinearBase, bias: Tensor | None) -> dict[str, Any]:
    if type(module).forward not in _LINEAR_FORWARDS:
        raise Unreadable(f"{type(module).__name__} is a linear layer with a forward of its own")
    if "apply" in vars(module.quant_method):
        raise Unreadable(f"its {type(module).__name__} computes in a way of its own")
    if module.skip_bias_add and module.has_bias:
        raise Unreadable(f"its {type(module).__name__} hands its bias to others")
    quantised = stored(module) is not None
    like = _like(module) if quantised else module.weight
    own = {"weight": _full_size((module.output_size, module.input_size), like)}
    if module.has_bias:
        own["bias"] = _full_size((module.output_size,), like)
    if not quantised:  # else the others say what the weight is
        # A correction bias may lie in the gate's module; it is the router's, which reading takes as it is.
        more = {name: p for name, p in module._parameters.items() if p is not None and p is not bias}
        own = more | own
    dtype = getattr(module, "out_dtype", None)
    parts = module.tp_size if isinstance(module, RowParallelLinear) and not module.reduce_results else 1

    def forward(self: nn.Module, input_: Tensor) -> Tensor | tuple[Tensor, None]:
        weight = self._parameters["weight"]
        assert weight is not None
        y = F.linear(input_.to(weight.dtype), weight, self._parameters.get("bias"))
        y = y if dtype is None else y.to(dtype)
        y = y if parts == 1 else y / parts
        return (y, None) if module.return_bias else y

    return {"forward": MethodType(forward, module), "_parameters": own}


def _experts(runner: MoERunner) -> dict[str, Any]:
    """Stacked weights of all experts in their full width, and nothing else: maps and masks are about placement."""
    config, experts_ = runner.moe_config, runner.routed_experts
    like = experts_.w13_weight if stored(experts_) is None else _like(experts_)
    experts, hidden, width = config.num_logical_experts, config.hidden_dim_unpadded, config.intermediate_size
    weights = {"w13_weight": _full_size((experts, 2 * width, hidden), like)}
    weights["w2_weight"] = _full_size((experts, hidden, width), like)
    return {"_parameters": weights, "_buffers": {}}


def _runner(routed: Routed, block: nn.Module) -> dict[str, Any]:
    runner = routed.runner
    experts, top_k, scale = runner.routed_experts, runner.moe_config.experts_per_token, runner.routed_scaling_factor
    _, act = ACTIVATIONS[experts.activation.value]
    gate, parts, shared = runner.gate, parts_of(runner), shared_inside(runner)
    inside: dict[str, nn.Module] = {"routed_experts": experts}
    if gate is not None and not any(module is gate for module in _beside(block, runner)):
        inside["gate"] = gate
    if shared is not None and not any(module is shared for module in _beside(block, runner)):
        raise Unreadable("its shared expert is inside of its routed layer alone")
    if shared is not None and scale != 1.0 and runner.moe_config.in_dtype == torch.float16:
        raise Unreadable(f"in float16 vLLM divides the shared expert by the routed scale ({scale:g})")
    # What a rank adds is counted as often as there are ranks to sum over; the routed experts' sum is whole here.
    summed = ranks() if parts == 1 else 1

    def compute(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        w13, w2 = experts._parameters["w13_weight"], experts._parameters["w2_weight"]
        assert w13 is not None and w2 is not None
        gate_half, up_half = (w13[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
        outputs = (w2[ids] @ (act(gate_half) * up_half).unsqueeze(-1)).squeeze(-1)
        out = (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
        out = out if parts == 1 else out / parts
        return out if scale == 1.0 else out * scale

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        router_logits: Tensor,
        input_ids: None = None,
        shared_experts_input: Tensor | None = None,
        **unused: None,
    ) -> Tensor:
        if gate is not None:
            router_logits, _ = gate(hidden_states)
        weights, ids = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
        if experts.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = compute(hidden_states, weights, ids)
        if shared is None:
            return out
        beside = shared(hidden_states if shared_experts_input is None else shared_experts_input)
        return out + (beside if summed == 1 else beside * summed)

    def forward_given(
        self: nn.Module, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, **unused: Any
    ) -> Tensor:
        return compute(hidden_states, topk_weights, topk_ids)

    chosen = forward_given if routed.routes == "given" else forward
    return {"forward": MethodType(chosen, runner), "_modules": inside}


def _beside(block: nn.Module, runner: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that it holds outside its routed layer."""
    waiting = [block]
    while waiting:
        for child in waiting.pop().children():
            if child is not runner:
                yield child
                waiting.append(child)


def _like(module: Any) -> Tensor:
    """A tensor on the device of a layer's quantised weights, in the dtype that it computes in."""
    device = next(module.parameters(recurse=False)).device
    return torch.empty(0, dtype=module.params_dtype, device=device)


def _full_size(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """A weight of another size than ``like``, on its device and in its dtype; it takes no memory."""
    return nn.Parameter(like.new_empty(()).expand(shape), requires_grad=False)
