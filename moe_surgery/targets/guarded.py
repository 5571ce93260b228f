"""What every swapped block has in common: it is for inference, in one dtype on one device, and says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from moe_surgery.errors import GradientError, SurgeryError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import StandingBlock
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.targets.unchanged import Unchanged
from moe_surgery.weights.tensors import BlockTensors


class GuardedBlock(StandingBlock):
    """A sparse-MoE block computed by somebody's kernels, for inference.

    Takes ``[..., H]`` and returns the same shape; the input is not written to. Its weights lie in the kernels' own
    layout, so it can't be saved, loaded, copied or converted to another dtype or device: each is an error that says so.
    ``kernels`` is what messages call those that compute.
    """

    kernels = "these MoE kernels"

    def __init__(self, spec: MoESpec, router: Tensor, label: str, dtype: torch.dtype | None = None) -> None:
        """``dtype`` is that of the block's input, None for its router's."""
        super().__init__()
        self._dtype = dtype or router.dtype
        self.spec = spec
        self.label = label
        self.fused_router = nn.Parameter(router, requires_grad=False)
        self._observed: ObservedRouter | None = None
        self._unchanged: Unchanged | None = None

    def flat_tokens(self, hidden_states: Tensor) -> Tensor:
        """The input as [T, H], contiguous; hooks on the old router are called.

        Raises :class:`GradientError` where gradients are asked for or the block is in training mode, and
        :class:`SurgeryError` for another dtype than the block's, under autocast, where somebody has changed the
        weights of the block that stood here, and where a hook would change the routing.
        """
        self._refuse_what_kernels_cannot(hidden_states)
        self._refuse_changed_weights()
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        if self._observed is not None and self._observed.has_hooks:
            self._observed.tell(x)
        return x

    def observe(self, name: str, router: ObservedRouter) -> None:
        """Keep the replaced block's router as child ``name``, so that hooks on it go on firing.

        transformers records ``router_logits`` by forward hooks on the routers, found by class when first asked for.
        The router is called with the tokens [T, H] whenever it has forward hooks; its output is not used.
        """
        if hasattr(self, name):
            raise ValueError(f"a child can't be named {name!r} here: the block has an attribute of that name")
        self.add_module(name, router)
        object.__setattr__(self, "_observed", router)  # a child once, not twice

    def extra_repr(self) -> str:
        return self.spec.sentence()

    def _refuse_what_kernels_cannot(self, x: Tensor) -> None:
        if self.training:
            raise GradientError("a swapped MoE block is for inference; call model.eval(), or undo before training")
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._own_parameters())):
            raise GradientError(
                f"{self.kernels} have no backward pass and would give wrong gradients silently; run under "
                "torch.no_grad() or torch.inference_mode(), as generate() does, or undo before training"
            )
        weight = self.fused_router
        if x.dtype != self._dtype or x.device != weight.device:
            raise SurgeryError(
                f"a swapped MoE block was built for {self._dtype} on {weight.device}; got {x.dtype} on {x.device}"
            )
        if torch.is_autocast_enabled(x.device.type):
            raise SurgeryError("a swapped MoE block computes in the dtype it was built for; turn autocast off")

    def keep_original(self, original: nn.Module | None) -> None:
        super().keep_original(original)
        mine = {f"{name}, of the new block,": weight for name, weight in self.named_parameters()}
        unchanged = None if original is None else Unchanged.of(_weights(original, self._buffers) | mine)
        object.__setattr__(self, "_unchanged", unchanged)

    def _refuse_changed_weights(self) -> None:
        """A compiled graph doesn't ask."""
        if torch.compiler.is_compiling() or self._unchanged is None:
            return
        name = self._unchanged.broken()
        if name is not None:
            path = "" if self.likeness is None else f"{self.likeness.path}."
            raise SurgeryError(
                f"{path}{name} has been changed in place since the block was replaced, which a swapped MoE block sees "
                "in part at most; undo, and operate again"
            )

    def _own_parameters(self) -> Iterable[nn.Parameter]:
        """The block's weights that take gradients, if any does."""
        return self.parameters(recurse=False)

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Let through what changes nothing (``model.to("cpu")`` on a CPU model)."""
        weight = self.fused_router
        for dtype in {self._dtype, weight.dtype}:
            after = fn(torch.empty(0, dtype=dtype, device=weight.device))
            if after.dtype != dtype or after.device != weight.device:
                raise SurgeryError(
                    f"a swapped MoE block can't go from {dtype} on {weight.device} to {after.dtype} on "
                    f"{after.device}: its weights lie in the kernels' layout. Undo, convert the model, operate again"
                )
            # Values that no memory can hold by chance, which each floating dtype but the shortest can.
            told = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8).to(weight.device, dtype)
            if not torch.equal(fn(told.clone()), told):
                raise SurgeryError("a swapped MoE block can't be given other weights, or none: undo first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.check_conversion(fn)
        super()._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """``fn`` of this module; those in it are the kernels' own, and may call other things by this name."""
        fn(self)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._likeness is None:
            raise SurgeryError(
                "a swapped MoE block's weights lie in the kernels' layout and can't be saved; undo first"
            )
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self._likeness is None:
            raise SurgeryError("a swapped MoE block's weights lie in the kernels' layout; load before operating")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SurgeryError("a swapped MoE block can't be copied or pickled; undo first, then operate on the copy")


def _weights(block: nn.Module, without: Container[str]) -> dict[str, Tensor]:
    """The parameters and buffers of a block but those that are called as in ``without``."""
    named = (*block.named_parameters(), *block.named_buffers())
    return {name: tensor for name, tensor in named if name not in without}


def measure(block: nn.Module, tensors: BlockTensors) -> tuple[int, int]:
    """Bytes of weights newly allocated and bytes shared, told apart by the storage they lie in.

    Tensors that were stacked for the build are new memory themselves, if the kernels take them as they are.
    """
    given = [tensors.router, tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj]
    given += [tensors.shared_gate, tensors.router_bias, tensors.correction_bias, tensors.output_bias]
    given += [] if tensors.copied else [tensors.w13, tensors.w2, tensors.w13_bias, tensors.w2_bias]
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
