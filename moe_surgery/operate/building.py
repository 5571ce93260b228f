"""Making the block that takes a site's place: it computes what the old one did, and answers for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.answers import Updated, Written
from moe_surgery.interrupts import without_interrupts
from moe_surgery.read.reading import Reading
from moe_surgery.read.record.attributes import made
from moe_surgery.read.record.tensor_entries import own_dtype, storage
from moe_surgery.replay import Replay
from moe_surgery.targets.base import StandingBlock, Target
from moe_surgery.targets.convention import Convention
from moe_surgery.targets.likeness import Likeness
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.targets.own_part import OwnPart
from moe_surgery.weights.own_router import asking_its_own
from moe_surgery.weights.reach import has_weights, reachable
from moe_surgery.weights.tensors import BlockTensors, gather, weight


class Unanswerable(Exception):
    """A block that can't answer for the one it would replace; the message is why. Never leaves this folder."""


def built(block: nn.Module, reading: Reading, tensors: BlockTensors, target: Target, path: str) -> StandingBlock:
    """What ``target`` makes of ``block``, which was read so and has ``tensors``; it stands for the block at ``path``.

    Raises :class:`Unanswerable` if it can't, and what the target raises.
    """
    spec = reading.spec
    new = target.build(spec.built, tensors if spec.built == spec else tensors.of_experts(), prefix=path)
    likeness = Likeness.of(block, path).beside(_objects(block, reading))
    for (inside, _), _ in reading.kept:
        if not likeness.reaches(inside):
            raise Unanswerable(f"its {inside}, which calls write to, holds weights too")
    if overlap := new.overlap(likeness, [name for (inside, name), _ in reading.kept if not inside]):
        raise Unanswerable(f"its attribute {overlap[0]} would be answered by one of the replacement's own")
    new.hold_buffers(block, state := changing(reading))
    own = own_part(block, reading, tensors, new._buffers if state else {})
    if own is not None:
        new.add_module("own_part", own)
    new.convention = Convention.of(spec, reading.calling, reading.results, tensors, own, reading.kept)
    owner, _, _ = reading.layout.router.path.rpartition(".")
    if owner and "." not in owner:
        router = block.get_submodule(owner)
        new.observe(owner, ObservedRouter(router, Likeness.of(router, f"{path}.{owner}")))
    new.stand_for(likeness.without(state))
    take_over(new, block, reading)
    return new


def _objects(block: nn.Module, reading: Reading) -> dict[str, Any]:
    """What calls of a block write to that is no module and leads to none of its weights; earlier calls left tensors."""
    weights = {storage(tensor) for tensor in (*block.parameters(), *block.buffers())}
    names = {inside.partition(".")[0] for (inside, _), _ in reading.kept} & vars(block).keys()
    return {
        name: vars(block)[name]
        for name in names
        if not any(
            has_weights(found) if isinstance(found, nn.Module) else storage(found) in weights
            for found in reachable([vars(block)[name]], set())
        )
    }


def changing(reading: Reading) -> list[str]:
    """The buffers of a block that every call changes."""
    return [name for (_, name), value in reading.kept if isinstance(value, Updated)]


@contextmanager
def uncounted(model: nn.Module, readings: Mapping[str, Reading]) -> Iterator[None]:
    """Afterwards the buffers that every call of a block changes hold what they held: no call of ours counts."""
    buffers = [
        model.get_submodule(path).get_buffer(name) for path, reading in readings.items() for name in changing(reading)
    ]
    held = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with without_interrupts(), torch.inference_mode(False), torch.no_grad():
            for buffer, values in zip(buffers, held, strict=True):
                buffer.copy_(values)


def take_over(new: StandingBlock, block: nn.Module, reading: Reading) -> None:
    """Give ``new`` the attributes that the block writes when it is called, as the block has them now.

    Those that are the same after every call are there at once.
    """
    weights = dict(block.named_parameters())
    device, dtype = next(iter(weights.values())).device, own_dtype(weights)
    modules = dict(block.named_modules())
    for (inside, name), value in reading.kept:
        if isinstance(value, Updated) or inside not in modules:  # the very same buffer or object, used as it is
            continue
        held = vars(modules[inside])
        for attributes in new.attributes(inside):
            if not isinstance(value, Written):
                attributes[name] = made(value, device, dtype or torch.float32)
            elif name in held:
                attributes[name] = held[name]
            else:
                attributes.pop(name, None)


def own_part(
    block: nn.Module, reading: Reading, tensors: BlockTensors, state: Mapping[str, Tensor | None]
) -> OwnPart | None:
    """The part of ``block`` that its own operations go on computing, if there is any; buffers in ``state`` change."""
    if reading.program is None:
        return None
    weights = {name: weight(block, name) for name in reading.program.weights}
    return OwnPart(Replay(reading.program, weights, state), reading.spec, tensors)


def gathered(block: nn.Module, reading: Reading) -> BlockTensors:
    """The weights of a block that was read so; for a router of its own, with something to ask about it.

    Such a router has no matrix that tells which tokens it sends where. One of its weights that looks like a router's,
    or else random numbers, stands for it where tokens are made up.
    """
    tensors = gather(block, reading.layout)
    spec, program = reading.spec, reading.program
    if not spec.router.own or spec.at == "experts" or program is None:
        return tensors
    weights = {name: weight(block, name) for name in program.weights}
    return asking_its_own(tensors, program, weights, spec.router.num_experts, spec.hidden)


class Double(StandingBlock):
    """Takes a block's place while the model around it is checked, where the block itself must make room for the next.

    Its attributes are the block's; its output is at hand already, so that it has none of its own. What the block wrote,
    call by call as the model makes them, is ``wrote``.
    """

    def __init__(self, block: StandingBlock, wrote: Iterable[Mapping[tuple[str, str], Any]]) -> None:
        super().__init__()
        self._places, self._wrote = block.places(), iter(wrote)
        self.label, self.rule = block.label, block.rule
        for name, child in block.named_children():
            if isinstance(child, ObservedRouter):
                self.add_module(name, child)
        likeness = block.likeness
        assert likeness is not None
        self.hold_buffers(block, [name for name, _ in block.convention.state] if block.convention is not None else [])
        self.stand_for(likeness)
        self.eval()

    def places(self) -> tuple[tuple[str, str], ...]:
        return self._places

    def forward(self, *given: Tensor, **named: Tensor) -> None:
        for (path, name), value in next(self._wrote, {}).items():
            self.write(path, name, value)
