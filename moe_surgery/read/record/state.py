"""State that a forward keeps outside of its tensors' elements: attributes, globals, closure cells, random generators.

A block that counts its calls, or throws Python's dice, does something else next time. One record can't show that, so
what its code can reach is compared before and after, and put back.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.read.record.attributes import Attributes
from moe_surgery.read.record.contents import Contents, held_by_name, print_but_attributes, print_of
from moe_surgery.read.record.reach import Reach, identical
from moe_surgery.read.record.tensor_entries import storage

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_TABLES = ("_parameters", "_buffers", "_modules")
_ABSENT = object()


def watched(block: nn.Module) -> dict[str, Any]:
    """Fingerprints of everything that ``block`` could keep state in, by what to call it."""
    return {**_random_numbers(), **_prints(block, Reach(block))}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, by name."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _random_numbers() -> dict[str, Any]:
    seen: dict[str, Any] = {"Python's random numbers": hash(random.getstate())}
    seen["torch's random numbers"] = torch.get_rng_state().numpy().tobytes()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        seen["numpy's random numbers"] = name, keys.tobytes(), rest
    return seen


def _prints(block: nn.Module, reach: Reach) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    held = dict(reach.holders)
    told = {id(holder) for holder in held.values()}  # whose attributes are looked at one by one
    for path, holder in held.items():
        for name, value in held_by_name(holder).items():
            if name not in _INTERNAL:
                found = print_but_attributes(value, told) if id(value) in told else print_of(value, told)
                seen[f"{path}.{name}".lstrip(".")] = found
    for path, module in block.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            seen[f"{path}.{name}".lstrip(".")] = None if tensor is None else (id(tensor), str(tensor.dtype))
    for place in reach.places:
        seen[place.name] = print_of(place.value, told)
    return seen


class Written:
    """What a block could keep state in before a call, to tell what the call wrote, and to undo it.

    That is the attributes of its modules and of objects in them. Weights and submodules are put back too: code that
    converts its own router when it is called would leave a weight of the record there. So is what stands in containers,
    and in classes and globals that the code names.
    """

    def __init__(self, block: nn.Module, reach: Reach | None = None) -> None:
        self._reach = reach = reach or Reach(block)
        self._before = {path: (holder, dict(held_by_name(holder))) for path, holder in reach.holders}
        held = [value for _, had in self._before.values() for name, value in had.items() if name not in _INTERNAL]
        self._contents = Contents([*held, *(place.value for place in reach.places)])
        self._tables = [(vars(m)[name], dict(vars(m)[name])) for m in block.modules() for name in _TABLES]
        self._data = [(tensor, tensor.detach()) for tensor in (*block.parameters(), *block.buffers())]

    def give(self, values: Attributes) -> None:
        """Give attributes, by module and name, other values."""
        for (path, name), value in values.items():
            held_by_name(self._before[path][0])[name] = value

    def changed(self) -> Attributes:
        """What the call wrote, by module and name."""
        found: Attributes = {}
        for path, (holder, before) in self._before.items():
            for name, value in held_by_name(holder).items():
                if before.get(name, _ABSENT) is not value:
                    found[path, name] = value
        return found

    def intact(self) -> bool:
        """Whether the call left the very same objects everywhere; what can't be told counts as changed."""
        return (
            all(identical(held_by_name(holder), before) for holder, before in self._before.values())
            and all(identical(table, entries) for table, entries in self._tables)
            and all(_same_data(tensor, data) and not _follows(tensor) for tensor, data in self._data)
            and self._reach.intact()
            and self._contents.intact()
        )

    def undo(self) -> None:
        """Put back what was there before the call."""
        self._contents.undo()
        for place in self._reach.places:
            if isinstance(place.owner, dict):
                place.owner[place.attribute] = place.value
            elif place.owner is not None and vars(place.owner).get(place.attribute) is not place.value:
                setattr(place.owner, place.attribute, place.value)
        for table, entries in self._tables:
            if [(name, id(value)) for name, value in table.items()] != [(n, id(v)) for n, v in entries.items()]:
                table.clear()
                table.update(entries)
        for tensor, data in self._data:
            if not _same_data(tensor, data):
                tensor.data = data
            if _follows(tensor):
                tensor.detach_()
        for holder, before in self._before.values():
            held = held_by_name(holder)
            for name in [name for name in held if name not in before]:
                del held[name]
            held.update({name: value for name, value in before.items() if held.get(name, _ABSENT) is not value})


def _same_data(tensor: Tensor, data: Tensor) -> bool:
    return (tensor.dtype, tensor.device, storage(tensor)) == (data.dtype, data.device, storage(data))


def _follows(tensor: Tensor) -> bool:
    """Whether a weight was written to where gradients are followed."""
    return tensor.grad_fn is not None and not tensor._is_view()


@contextmanager
def unwritten(*blocks: nn.Module) -> Iterator[None]:
    """Afterwards the blocks have the attributes that they had before."""
    written = [Written(block) for block in blocks]
    try:
        yield
    finally:
        for attributes in written:
            attributes.undo()


class Watch:
    """A block from one call to the next; what it could keep state in is gone through anew only after a change."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._known: tuple[dict[str, Any], Written] | None = None
        self._random: dict[str, Any] = {}

    def before(self) -> Written:
        """The block as it is before a call."""
        if self._known is None:
            reach = Reach(self.block)
            self._known = _prints(self.block, reach), Written(self.block, reach)
        self._random = _random_numbers()
        return self._known[1]

    def after(self) -> list[str]:
        """What the call changed, by name. It is put back, but for numbers that were drawn."""
        assert self._known is not None
        prints, written = self._known
        drawn = changes(self._random, _random_numbers())
        if written.intact():
            return drawn
        self._known = None
        try:
            return drawn + changes(prints, _prints(self.block, Reach(self.block)))
        finally:
            written.undo()
