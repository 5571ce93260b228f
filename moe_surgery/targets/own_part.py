"""The part of a replaced block that goes on being computed as the block did, beside the experts that were replaced."""

from __future__ import annotations

from torch import Tensor, nn

from moe_surgery.replay import Begun, Replay
from moe_surgery.spec import MoESpec
from moe_surgery.targets.formula import mixer
from moe_surgery.targets.shared_expert import shared_output, shared_parts
from moe_surgery.weights.tensors import BlockTensors

_SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj", "shared_gate", "output_bias")


class OwnPart(nn.Module):
    """What the block's own operations compute, and what else is not its routed experts. Weights are by reference."""

    shared_gate_proj: Tensor | None
    shared_up_proj: Tensor | None
    shared_down_proj: Tensor | None
    shared_gate: Tensor | None
    output_bias: Tensor | None
    scales = None

    def __init__(self, replay: Replay, spec: MoESpec, tensors: BlockTensors) -> None:
        super().__init__()
        self.replay, self.spec = replay, spec
        for name in _SHARED if spec.router.own else ():
            tensor = getattr(tensors, name)
            held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)
        self.eval()

    def around(self, begun: Begun, x: Tensor, routed: Tensor) -> Tensor:
        """The output for ``x`` of a block with a router of its own whose routed experts came to ``routed`` [..., H].

        ``begun`` is what its own operations made of the input so far.
        """
        if self.spec.own_rest:
            return begun.finished(routed)
        out = routed
        if self.spec.shared is not None:
            out = out + shared_output(self.spec, *shared_parts(self, x, mixer(self.spec.shared.mix), None))
        return out if self.output_bias is None else out + self.output_bias
