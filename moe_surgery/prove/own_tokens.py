"""Old and new block on tokens that the model itself gave to the old one.

What the old block returned then was computed with whatever stood in its weights at that moment. So a difference tells
of a new block that is wrong on these tokens, or of somebody who changes the weights, or the output, around the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_surgery.calling import Calling
from moe_surgery.prove.ground import measured
from moe_surgery.prove.metrics import NORM_FLOOR
from moe_surgery.spec import MoESpec
from moe_surgery.targets.reference_target import ReferenceExperts
from moe_surgery.weights.tensors import BlockTensors


@dataclass(frozen=True, eq=False)
class Heard:
    """A call of a block in the model: ``given`` its tensors, tokens first, and ``answer`` what it returned.

    Of a module of experts alone, ``given`` are tokens, ids and weights. ``tensors`` are those of a call that takes
    others beside the block's input, by role.
    """

    given: Sequence[Tensor]
    answer: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def by_role(self, calling: Calling, at: str) -> Heard:
        """The same with the block's own tensors alone: its input, or tokens, ids and weights ``at`` experts."""
        if at == "block":
            given = self.tensors["hidden_states"] if self.tensors else self.given[0]
            return replace(self, given=[calling.tokens(given)], answer=calling.tokens(self.answer))
        tensors = calling.taken(self.given, {})
        own = [tensors[role] for role in ("hidden_states", "ids", "weights")]
        answer = self.answer if calling.slots is None else self.answer.reshape(own[0].shape)
        return replace(self, given=own, answer=answer)

    def roles(self) -> dict[str, Tensor]:
        """The block's own tensors by role."""
        return {**dict(zip(("hidden_states", "ids", "weights"), self.given, strict=False)), **self.tensors}


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative L2 distance of every token [T]; infinite where one isn't finite."""
    one, other = (y.reshape(-1, y.shape[-1]).double() for y in (found, wanted))
    norms = other.norm(dim=-1)
    apart = (one - other).norm(dim=-1)
    relative = apart / norms.maximum(NORM_FLOOR * norms.median())
    relative = relative.where(apart != 0, 0.0)
    return relative.where(relative.isfinite(), torch.inf)


def disagreement(
    heard: Heard, answer: Tensor, spec: MoESpec, tensors: BlockTensors, bound: float
) -> tuple[float, str | None]:
    """How far the new block's ``answer`` is from the old one's, worst token, and what is wrong if anything is.

    ``bound`` is how far a right block may be from the truth, as its proof measured. Where the two are further apart
    than twice that, both are held against the truth on these very tokens, with its near ties and its own noise.
    """
    if answer.shape != heard.answer.shape or answer.dtype != heard.answer.dtype:
        return float("inf"), f"the new block returns {_kind(answer)} where the old one returned {_kind(heard.answer)}"
    if answer.numel() == 0:
        return 0.0, None
    apart = float(distance(answer, heard.answer).max())
    if apart <= 2 * bound:
        return apart, None
    if heard.tensors:  # the truth is known of what is made up beside the input only
        return (
            apart,
            f"on the model's own tokens the new block is {apart:.2g} from the old one; {2 * bound:.2g} is its noise",
        )
    new, old, limit = _from_truth(heard, answer, spec, tensors, bound)
    if new > limit:
        return (
            apart,
            f"on the model's own tokens the new block is {new:.2g} from the reference; {limit:.2g} is its noise",
        )
    if old > limit:
        return apart, (
            f"in the model the old block's output is {old:.2g} from what its weights give ({limit:.2g} is its noise): "
            "something around it changes its weights or its output"
        )
    return apart, None


def _from_truth(
    heard: Heard, answer: Tensor, spec: MoESpec, tensors: BlockTensors, bound: float
) -> tuple[float, float, float]:
    """The distance of the new and the old answer from the reference, and the limit for both."""
    x = heard.given[0].reshape(-1, heard.given[0].shape[-1])
    both = [y.reshape(x.shape) for y in (answer, heard.answer)]
    if spec.at == "experts":
        wanted = ReferenceExperts(spec, tensors)(x.double(), *heard.given[1:])
        new, old = (float(distance(y, wanted).max()) for y in both)
        return new, old, 2 * bound
    truth, kept, limit = measured(spec, tensors, x)
    if truth is None:
        return 0.0, 0.0, limit
    everyone = torch.arange(int(kept.sum()), device=x.device)
    new, old = (float(truth.distance(y[kept], everyone)[0].max()) for y in both)
    return new, old, max(limit, bound)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
