"""Making the block that takes a site's place: it computes what the old one did, and answers for it."""

from __future__ import annotations

from torch import Tensor, nn

from moe_surgery.read.reading import Reading
from moe_surgery.read.record.attributes import made
from moe_surgery.targets.base import StandingBlock, Target
from moe_surgery.targets.convention import Convention
from moe_surgery.targets.likeness import Likeness
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.weights.tensors import BlockTensors


class Unanswerable(Exception):
    """A block that can't answer for the one it would replace; the message is why. Never leaves this folder."""


def built(block: nn.Module, reading: Reading, tensors: BlockTensors, target: Target, path: str) -> StandingBlock:
    """What ``target`` makes of ``block``, which was read so and has ``tensors``; it stands for the block at ``path``.

    Raises :class:`Unanswerable` if it can't, and what the target raises.
    """
    new = target.build(reading.spec, tensors, prefix=path)
    likeness = Likeness.of(block, path)
    if overlap := new.overlap(likeness):
        raise Unanswerable(f"its attribute {overlap[0]} would be answered by one of the replacement's own")
    if reading.spec.at == "experts" or not (reading.calling.plain and reading.results is None):
        new.convention = Convention.of(reading.spec, reading.calling, reading.results, tensors)
    for (inside, name), value in reading.kept:
        if not inside and not hasattr(new, name):
            setattr(new, name, made(value, tensors.w13.device, tensors.w13.dtype))
    owner, _, _ = reading.layout.router.path.rpartition(".")
    if owner and "." not in owner:
        router = block.get_submodule(owner)
        new.observe(owner, ObservedRouter(router, Likeness.of(router, f"{path}.{owner}")))
    new.stand_for(likeness)
    return new


class Double(StandingBlock):
    """Takes a block's place while the model around it is checked, where the block itself must make room for the next.

    Its attributes are the block's; its output is at hand already, so that it has none of its own.
    """

    def __init__(self, block: StandingBlock) -> None:
        super().__init__()
        self.label, self.rule = block.label, block.rule
        for name, child in block.named_children():
            if isinstance(child, ObservedRouter):
                self.add_module(name, child)
        likeness = block.likeness
        assert likeness is not None
        self.stand_for(likeness)
        self.eval()

    def forward(self, *given: Tensor, **named: Tensor) -> None:
        return None
