"""The block that takes the place of a model's own: vLLM's layer behind the interface the model expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.errors import GradientError, SurgeryError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.targets.reference import within
from moe_surgery.targets.vllm.routing import handed
from moe_surgery.weights.tensors import BlockTensors


class FusedMoEBlock(SwappedBlock):
    """A sparse-MoE block computed by vLLM's kernels, for inference.

    Takes ``[..., H]`` and returns the same shape; the input is not written to. Its weights lie in the kernels' own
    layout, so it can't be saved, loaded, copied or converted to another dtype or device: each is an error that says so.
    vLLM keeps the forward context in a module global: run one thread of a process at a time.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors, fused: nn.Module, label: str) -> None:
        super().__init__()
        self.spec = spec
        self.label = label
        self.router_weight = nn.Parameter(tensors.router, requires_grad=False)
        self.router_bias, self.output_bias = _frozen(tensors.router_bias), _frozen(tensors.output_bias)
        self.fused = fused
        self._observed: nn.Module | None = None
        self.new_bytes, self.moved_bytes = _measure(self, tensors)
        self.eval()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]`` in the block's dtype.

        Raises :class:`GradientError` where gradients are asked for or the block is in training mode, and
        :class:`SurgeryError` for another dtype than the block's and under autocast.
        """
        self._refuse_what_kernels_cannot(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        if self._observed is not None and self._observed._forward_hooks:
            self._observed(x)
        work = torch.float32 if self.spec.router.logits_dtype == "float32" else x.dtype
        bias = None if self.router_bias is None else self.router_bias.to(work)
        logits = F.linear(x.to(work), self.router_weight.to(work), bias)
        out: Tensor = self.fused(x, logits)
        if self.output_bias is not None:
            out = out + self.output_bias
        return out.view(hidden_states.shape)

    def observe(self, name: str, router: nn.Module) -> None:
        """Keep the replaced block's router as child ``name``, so that hooks on it go on firing.

        transformers records ``router_logits`` by forward hooks on the routers, found by class when first asked for.
        The router is called with the tokens [T, H] whenever it has forward hooks; its output is not used.
        """
        if hasattr(self, name):
            raise ValueError(f"a child can't be named {name!r} here: the block has an attribute of that name")
        self.add_module(name, router)
        self._observed = router

    def extra_repr(self) -> str:
        return self.spec.sentence()

    def _refuse_what_kernels_cannot(self, x: Tensor) -> None:
        if self.training:
            raise GradientError("a swapped MoE block is for inference; call model.eval(), or undo before training")
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._own_parameters())):
            raise GradientError(
                "vLLM's MoE layers have no backward pass and would give wrong gradients silently; run under "
                "torch.no_grad() or torch.inference_mode(), as generate() does, or undo before training"
            )
        weight = self.router_weight
        if x.dtype != weight.dtype or x.device != weight.device:
            raise SurgeryError(
                f"a swapped MoE block was built for {weight.dtype} on {weight.device}; got {x.dtype} on {x.device}"
            )
        if torch.is_autocast_enabled(x.device.type):
            raise SurgeryError("a swapped MoE block computes in the dtype it was built for; turn autocast off")

    def _own_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.router_weight, *self.fused.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let through what changes neither dtype nor device (``model.to("cpu")`` on a CPU model)."""
        weight = self.router_weight
        after = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
        if after.dtype != weight.dtype or after.device != weight.device:
            raise SurgeryError(
                f"a swapped MoE block can't go from {weight.dtype} on {weight.device} to {after.dtype} on "
                f"{after.device}: its weights lie in the kernels' layout. Undo, convert the model, operate again. "
                "Modules before this block are already converted"
            )
        super()._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SurgeryError("a swapped MoE block's weights lie in the kernels' layout and can't be saved; undo first")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SurgeryError("a swapped MoE block's weights lie in the kernels' layout; load before operating")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SurgeryError("a swapped MoE block can't be copied or pickled; undo first, then operate on the copy")


class FusedExperts(FusedMoEBlock):
    """The routed experts alone, behind the router of the model's own, computed by vLLM's kernels, for inference.

    Takes tokens ``[..., H]``, expert ids [T, k] and routing weights [T, k], and returns the weighted sum ``[..., H]``.
    Ids beyond the experts stand for none, as they do for transformers' experts.
    """

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """See :meth:`FusedMoEBlock.forward` for the errors it raises."""
        hidden_states, ids, weights = self.arguments(given, named)
        self._refuse_what_kernels_cannot(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        experts, count = self.spec.experts, ids.shape[-1]
        ids, weights = ids.reshape(-1, count), weights.reshape(-1, count).float() * self.spec.router.scale
        kept, scaled = within(ids, weights, experts.num_experts)
        out: Tensor = self.fused(x, handed(scaled, kept))
        if experts.identities:
            own = (ids >= experts.num_experts) & (ids < experts.num_experts + experts.identities)
            out = out + (x * weights.where(own, 0.0).sum(-1, keepdim=True)).to(x.dtype)
        return out.view(hidden_states.shape)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _measure(block: nn.Module, tensors: BlockTensors) -> tuple[int, int]:
    """Bytes of weights newly allocated and bytes shared, told apart by the storage they lie in.

    Tensors that were stacked for the build are new memory themselves, if the kernels take them as they are.
    """
    given = [tensors.router, tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj]
    given += [tensors.shared_gate, *([] if tensors.copied else [tensors.w13, tensors.w2])]
    originals = {tensor.untyped_storage().data_ptr() for tensor in given if tensor is not None}
    new: dict[int, int] = {}
    moved = 0
    for parameter in block.parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() in originals:
            moved += parameter.nbytes
        else:
            new[storage.data_ptr()] = storage.nbytes()
    return sum(new.values()), moved
