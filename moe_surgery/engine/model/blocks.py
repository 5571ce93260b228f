"""The block that takes an engine block's place: the model's own router and shared expert around vLLM's fused layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.platforms import current_platform

from moe_surgery.engine.model.layers import copies, first, is_linear, owner, owner_path, ranks
from moe_surgery.engine.model.routed import stored
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.read.reading import Reading
from moe_surgery.spec import Activation, MoESpec, RouterSpec
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.weights.layout import MLPPieces, Piece

_ACTIVATIONS: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_Between = Callable[[Tensor, Tensor, Tensor, float, str], tuple[Tensor, Tensor]]


class EngineBlock(SwappedBlock):
    """A sparse-MoE block of an engine: tokens [T, H] to [T, H], summed over the ranks of tensor parallelism.

    Its children are those of the block it replaces, under their own names and with the routed layer last, so that
    every weight keeps its name: vLLM names a weight that is reachable twice by the first way it finds.
    """

    def __init__(
        self,
        old: nn.Module,
        router: str,
        name: str,
        runner: nn.Module,
        logits: nn.Module | None,
        *,
        without: frozenset[str] | None = None,
    ) -> None:
        """``router``: the child that gives the logits, "" if the routed layer calls it; ``logits`` stands in for it.

        ``without`` are the children that hold a shared expert which was folded, None if none was.
        """
        super().__init__()
        self.label = "vLLM shared-fused MoE" if without is None else "vLLM MoE, shared expert folded"
        for key, child in old.named_children():
            if key != name and key not in (without or ()):
                self.add_module(key, child)
        for key, parameter in old.named_parameters(recurse=False):
            self.register_parameter(key, parameter)
        for key, buffer in old.named_buffers(recurse=False):
            self.register_buffer(key, buffer, persistent=key not in old._non_persistent_buffers_set)
        self.add_module(name, runner)
        self._router = router if logits is None else "router_logits"
        self._routed = name
        if logits is not None:
            self.add_module(self._router, logits)
        self.training = False  # of this module alone: others may belong to more blocks than this one

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = first(getattr(self, self._router)(x)) if self._router else x
        out: Tensor = getattr(self, self._routed)(hidden_states=x, router_logits=logits)
        return out.view(hidden_states.shape)


class Place:
    """Where a layer is in a block: what stands there is looked up at every call, as adapters are put around layers.

    At the path "" that is the block itself.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self._path, _, self._name = path.rpartition(".")
        self._holder = block.get_submodule(self._path)

    def move(self, block: nn.Module) -> None:
        """Look it up in ``block`` from now on, under the same path, if it is there."""
        if not self._name:
            self._holder = block
            return
        with suppress(AttributeError):
            holder = block.get_submodule(self._path)
            if getattr(holder, self._name) is self():
                self._holder = holder

    def __call__(self) -> Any:
        return getattr(self._holder, self._name) if self._name else self._holder


class RouterLogits(nn.Module):
    """The logits of a router that computes more than them, or of a linear layer that lies deeper in the block.

    A linear layer is called, since kernels may take its weight away; of another router its weight alone is used. Either
    keeps its place and name.
    """

    def __init__(self, owner: Place, name: str, wide: bool) -> None:
        super().__init__()
        self.places = (owner,)
        self._name, self._wide = name, wide
        self._called = is_linear(owner())

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, E], in float32 if the router computes in it."""
        owner = self.places[0]()
        x = x.float() if self._wide else x
        if self._called:
            return first(owner(x))
        weight: Tensor = getattr(owner, self._name)
        return F.linear(x, weight.float() if self._wide else weight)


class SharedExpert(nn.Module):
    """A block's own shared expert as vLLM's layer calls it: with its gate and scale inside, a partial sum on each rank.

    vLLM adds what this returns to the routed experts' partial sum and reduces the two together. The linear layers are
    the model's own, and stay where they are in its tree. Where every rank computes the whole expert, each gives its
    part of the sum of all.
    """

    def __init__(self, block: nn.Module, reading: Reading) -> None:
        super().__init__()
        spec, shared, gate = reading.spec.shared, reading.layout.shared, reading.layout.shared_gate
        assert spec is not None and shared is not None
        up = None if shared.up.path == shared.gate.path else shared.up
        pieces = (shared.gate, up, shared.down, gate)
        self._layers = tuple(None if piece is None else Place(block, owner_path(piece)) for piece in pieces)
        self.places = tuple(place for place in self._layers if place is not None)
        act = get_act_and_mul_fn(_ACTIVATIONS[spec.activation])
        # vLLM compiles it by itself, and its guards take the host longer than the rest of this expert; so the kernel.
        self.act: Callable[[Tensor], Tensor] = act.forward_cuda if current_platform.is_cuda() else act
        self._between: _Between | None = None
        if current_platform.is_cuda():
            from moe_surgery.kernels.between import run_between  # needs Triton

            self._between = run_between
        self._activation: str = spec.activation
        self.factor = spec.scale / copies(self.down)
        if isinstance(self.down, LinearBase):
            self.down.reduce_results = False

    @property
    def gate_up(self) -> Any:
        """The layer of gate and up projection, or of the first alone."""
        return self._layer(0)

    @property
    def up(self) -> Any:
        return self._layer(1)

    @property
    def down(self) -> Any:
        return self._layer(2)

    @property
    def gate(self) -> Any:
        """The layer that gives the logit of its own gate, if it has one."""
        return self._layer(3)

    def _layer(self, number: int) -> Any:
        place = self._layers[number]
        return None if place is None else place()

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        between = self._between
        weight = None if between is None or x.shape[0] == 0 else _bare(self.gate, x)
        if between is None or weight is None:
            return self._by_layers(x)
        mixed, share = between(self._both(x).contiguous(), x, weight, self.factor, self._activation)
        return first(self.down(mixed)).mul_(share)

    def _by_layers(self, x: Tensor) -> Tensor:
        # First, while the routed experts, beside which this runs, are being chosen: later it would be waited for.
        weight = None if (gate := self.gate) is None else torch.sigmoid(first(gate(x)))
        y = first(self.down(self.act(self._both(x))))
        if weight is not None:
            y = weight * y
        return y if self.factor == 1.0 else y * self.factor

    def _both(self, x: Tensor) -> Tensor:
        """Gate and up projections, side by side."""
        h = first(self.gate_up(x))
        return h if (up := self.up) is None else torch.cat([h, first(up(x))], dim=-1)


class Absorbed(nn.Module):
    """What stands where a shared expert stood beside its block, which computes it now: it adds nothing.

    Its children and weights are those of the module it replaces, under their names, unless they were folded.
    """

    def __init__(self, old: nn.Module, *, folded: bool) -> None:
        super().__init__()
        if not folded:
            self._modules.update(old._modules)
            self._parameters.update(old._parameters)
        self.training = False  # of this module alone

    def forward(self, hidden_states: Tensor) -> float:
        return -0.0  # of which the sum with any number is that number, to the sign of a zero


def _bare(gate: Any, x: Tensor) -> Tensor | None:
    """The weight of a ``gate`` of which a kernel may compute what it does with ``x``; None if it must be called.

    Adapters are put around it, and others may have their say in its call; so it is looked at each time.
    """
    plain = type(gate) is nn.Linear or (type(gate) is ReplicatedLinear and stored(gate) is None)
    if not (plain and x.is_contiguous() and getattr(gate, "bias", None) is None):
        return None
    weight = getattr(gate, "weight", None)
    whole = isinstance(weight, Tensor) and weight.dtype == x.dtype and weight.is_contiguous()
    called = "forward" in vars(gate) or gate._forward_hooks or gate._forward_pre_hooks
    return weight if whole and not called else None


def unfit(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that was read can't be rebuilt here, if it can't."""
    assert item.reading is not None and config.model_config is not None
    spec, layout, block = item.reading.spec, item.reading.layout, item.block
    if item.routed is not None and "." in item.inside(item.routed.path):
        return f"its routed layer lies deeper than a child of the block ({item.routed.path})"
    if spec.router.scale != 1.0 and config.model_config.dtype == torch.float16:
        return f"in float16 vLLM divides the shared expert by the routed scale ({spec.router.scale:g})"
    if more := _plainly_routed(spec).beyond_plain():
        return f"a block with {', '.join(more)} is not rebuilt inside an engine yet"
    if any(piece.transposed or piece.out is not None or piece.cols is not None for piece in layout.pieces()):
        return "its weights are stored transposed or interleaved"
    if spec.experts.activation not in _ACTIVATIONS:
        return f"vLLM's fused layer has no activation {spec.experts.activation}"
    router = owner(block, layout.router)
    if copies(router) < ranks():
        return "its router's weight is shared out over the ranks"
    if spec.router.bias and not is_linear(router):
        return "its router's bias is not that of a linear layer"
    if is_linear(router) and spec.router.logits_dtype == "float32" and router.weight.dtype != torch.float32:
        return "its router's linear layer is not called as it is"
    if spec.shared is None or layout.shared is None:
        return None
    if spec.shared.activation not in _ACTIVATIONS:
        return f"vLLM has no fused activation {spec.shared.activation} for a shared expert"
    return _misplaced(block, layout.shared, layout.shared_gate)


def _plainly_routed(spec: MoESpec) -> MoESpec:
    """``spec`` with another router: routing is a function of the logits here, and can be any."""
    plain = RouterSpec(spec.router.num_experts, spec.router.top_k, "softmax", spec.router.renormalize)
    return replace(spec, router=plain)


def _misplaced(block: nn.Module, shared: MLPPieces, gate: Piece | None) -> str | None:
    """What of a shared expert isn't the whole weight of a linear layer, gate before up."""
    for piece in (shared.gate, shared.up, shared.down, *((gate,) if gate else ())):
        layer, name = owner(block, piece), piece.path.rpartition(".")[2]
        if name != "weight" or not is_linear(layer):
            return f"{piece} is not the weight of a linear layer"
        if piece.index is not None or piece.transposed:
            return f"{piece} is a part of a weight"
    if shared.gate.path == shared.up.path:
        if shared.gate.rows is None or shared.gate.rows[0] != 0:
            return f"{shared.gate.path} holds up before gate"
        layer = owner(block, shared.gate)
        if copies(layer) == 1 and ranks() > 1 and not isinstance(layer, MergedColumnParallelLinear):
            return f"{shared.gate.path} is one matrix for two, cut apart across the ranks"
    return None
