"""The target ``reference``: blocks that compute by the functions of :mod:`moe_surgery.targets.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.errors import GradientError, SurgeryError
from moe_surgery.spec import ExpertsSpec, MoESpec
from moe_surgery.targets.base import Context, Refusal, StandingBlock
from moe_surgery.targets.convention import answering
from moe_surgery.targets.formula import mixer
from moe_surgery.targets.guarded import GuardedBlock
from moe_surgery.targets.reference import Visits, chosen, expert_outputs, forward, weighted_sum, within
from moe_surgery.weights.tensors import BlockTensors


class ReferenceBlock(GuardedBlock):
    """A block that computes in float64 if it is a float64 block and in float32 otherwise, then rounds once.

    Experts are chosen in the block's own arithmetic: by what it ranks, rounded as it rounds.
    Takes and returns ``[..., H]`` in the weights' dtype. The weights are used by reference and take no gradient.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors) -> None:
        super().__init__(spec, tensors.router, ReferenceTarget.label, tensors.dtype)
        for name in (*_REQUIRED, *_OPTIONAL):
            tensor = getattr(tensors, name)
            self.register_parameter(
                f"spec_{name}", None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            )
        size = sum(parameter.nbytes for parameter in self.parameters())
        stacked = tensors.w13.nbytes + tensors.w2.nbytes if tensors.copied else 0
        self.new_bytes, self.moved_bytes = stacked, size - stacked
        self.eval()

    def _tensors(self) -> BlockTensors:
        tensors = {name: getattr(self, f"spec_{name}") for name in (*_REQUIRED, *_OPTIONAL)}
        return BlockTensors(self.fused_router, **tensors, copied=False)

    def _refuse_what_kernels_cannot(self, x: Tensor) -> None:
        """Training mode and other devices alone: plain torch computes in any dtype, with a backward to the input."""
        if self.training:
            raise GradientError("a swapped MoE block is for inference; call model.eval(), or undo before training")
        if x.device != self.fused_router.device:  # on the meta device some operations answer what nobody computed
            raise SurgeryError(
                f"a swapped MoE block got an input on {x.device}, and its weights lie on {self.fused_router.device}; "
                "undo first"
            )

    @answering
    def forward(self, x: Tensor) -> Tensor:
        work, flat, tensors = torch.promote_types(x.dtype, torch.float32), self.flat_tokens(x), self._tensors()
        ids = chosen(self.spec, tensors, flat)
        return forward(self.spec, tensors, flat, work, ids).to(x.dtype).view(x.shape)


class ReferenceExperts(ReferenceBlock):
    """The module of routed experts alone: tokens ``[..., H]``, ids [T, k] and weights [T, k] to ``[..., H]``."""

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        arguments = self.arguments(given, named)
        x, ids, weights = arguments.hidden_states, arguments.ids, arguments.weights
        work = torch.promote_types(x.dtype, torch.float32)
        flat, count = self.flat_tokens(x), ids.shape[-1]
        acting = self.spec.experts.acting
        ids, weights = within(ids.reshape(-1, count), weights.reshape(-1, count), acting)
        visits = Visits(flat.to(work).repeat_interleave(count, 0), ids.flatten().long(), mixer(self.spec.experts.mix))
        [outputs] = expert_outputs(self._tensors(), [visits], work)
        scaled = weights.to(work) * self.spec.router.scale
        out = weighted_sum(outputs.view(*ids.shape, x.shape[-1]), scaled, work)
        return self.answered(arguments, out.to(x.dtype).view(x.shape))


_REQUIRED = ("w13", "w2")
_OPTIONAL = (
    "shared_gate_proj",
    "shared_up_proj",
    "shared_down_proj",
    "shared_gate",
    "router_bias",
    "correction_bias",
    "w13_bias",
    "w2_bias",
    "output_bias",
)


class ReferenceTarget:
    """The target ``reference``: slow, plain, and right wherever torch runs."""

    name = "reference"
    label = "plain torch reference"

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """Every spec, in every floating dtype that torch multiplies matrices in."""
        if context.dtype not in _DTYPES:
            return Refusal(f"the reference computes in {', '.join(_DTYPES)}, not in {context.dtype}")
        if misfit := _misfit(spec.experts, spec):
            return Refusal(misfit)
        return None

    def remark(self, spec: MoESpec, context: Context) -> str | None:
        return None

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> StandingBlock:
        return (ReferenceBlock if spec.at == "block" else ReferenceExperts)(spec, tensors)


_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _misfit(experts: ExpertsSpec, spec: MoESpec) -> str | None:
    total = experts.total
    if total != spec.router.num_experts:
        return f"the router scores {spec.router.num_experts} experts, but there are {total}"
    if not 1 <= spec.router.top_k <= total:
        return f"top-{spec.router.top_k} of {total} experts can't be chosen"
    return None
