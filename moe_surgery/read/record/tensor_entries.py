"""What is known of every tensor object that a record has seen: what it depends on, and which storage it lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.answers import structured
from moe_surgery.read.record.known_numbers import Kind


@dataclass(frozen=True, eq=False)
class Support:
    """Where a tensor may be other than zero; ``kind`` is that of what this was calculated from."""

    places: Tensor
    kind: Kind


@dataclass(eq=False)
class Entry:
    """One tensor object: ``node`` (where the record made it) if it depends on the input, ``real`` data if it doesn't.

    ``storage`` is the same for all views of one tensor, ``version`` counts the writes to it that this tensor knows, and
    ``kinds`` holds every storage's kind. ``shift`` is where in that storage the tensor's own begins. A ``single`` one
    is one token, or one row of them, taken out of the batch by its place. ``support`` tells where a tensor may be other
    than zero, if it seems to be zero elsewhere.
    """

    tensor: Tensor
    node: Any
    meta: Tensor | None
    real: Tensor | None
    storage: int
    version: int
    kinds: dict[int, Kind]
    shift: int = 0
    single: bool = False
    support: Support | None = None

    @property
    def kind(self) -> Kind:
        """What the numbers stand for, if they are known."""
        return self.kinds.get(self.storage, Kind.PLAIN)

    def raise_kind(self, kind: Kind) -> None:
        self.kinds[self.storage] = max(kind, self.kind)

    def symbol(self) -> Tensor:
        """A meta tensor that stands for this one."""
        if self.meta is None:
            assert self.real is not None
            self.meta = shaped_like(self.real)
        return self.meta

    def starts(self, width: int) -> Tensor | None:
        """Where in the storage each run of ``width`` elements along the last dimension begins; None if none do."""
        held = self.tensor
        if not held.ndim or held.stride(-1) != 1 or held.shape[-1] % width or not held.numel():
            return None
        places = torch.tensor([self.shift + int(held.storage_offset())])
        for size, stride in zip(held.shape[:-1], held.stride()[:-1], strict=True):
            places = (places[:, None] + torch.arange(size) * stride).reshape(-1)
        return (places[:, None] + torch.arange(held.shape[-1] // width) * width).reshape(-1)


class Entries:
    """The tensors of one record. The block's weights are entered when first used, as meta tensors of ``dtype``.

    Those of another dtype than the block's own, such as a router's that is kept in float32, are entered as they are.
    ``guarded`` names the storages that must not be written to; ``vectors`` are the block's own buffers of less than two
    dimensions, by name; ``device`` is where the block would run.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.own = own_dtype(dict(block.named_parameters()) | dict(block.named_buffers()))
        self.guarded: dict[int, str] = {}
        self._known: dict[int, Entry] = {}
        self._versions: dict[int, int] = {}
        self._aliases: dict[int, tuple[int, int]] = {}
        self._writers: dict[int, list[tuple[int, Entry]]] = {}
        self._kinds: dict[int, Kind] = {}
        self._symbolic: set[int] = set()
        state = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
        self._state = {id(tensor): (name, tensor) for name, tensor in reversed(state)}
        self._storages = {storage(tensor): (name, tensor) for name, tensor in reversed(state)}
        self.sizes = {size for _, tensor in state for size in tensor.shape}
        # Which a call may change: the block's own, not those of its modules, which others may call.
        self.vectors = {name: tensor for name, tensor in block.named_buffers(recurse=False) if tensor.ndim < 2}
        devices = [tensor.device for _, tensor in state if not tensor.is_meta]
        self.device = devices[0] if devices else torch.device("cpu")

    def get(self, tensor: Tensor) -> Entry | None:
        return self._known.get(id(tensor))

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known or self.owned(tensor) is not None

    def owned(self, tensor: Tensor) -> str | None:
        """The name of the block's parameter or buffer that ``tensor`` is (or is a whole alias of)."""
        known = self._state.get(id(tensor)) or self._storages.get(storage(tensor))
        if known is None:
            return None
        name, state = known
        same = tensor is state or (tensor.shape == state.shape and tensor.stride() == state.stride())
        return name if same and tensor.storage_offset() == state.storage_offset() else None

    def enter(
        self, tensor: Tensor, node: Any, meta: Tensor | None, real: Tensor | None, kind: Kind = Kind.PLAIN
    ) -> Entry:
        place = storage(tensor)
        place, shift = self._aliases.get(place, (place, 0))
        entry = Entry(tensor, node, meta, real, place, self._versions.setdefault(place, 0), self._kinds, shift)
        entry.raise_kind(kind)
        self._known[id(tensor)] = entry
        return entry

    def find(self, tensor: Tensor, weight: Callable[[str], Any]) -> Entry:
        """The tensor's entry; ``weight`` makes the node of a weight, given its name, when it is first used."""
        entry = self._known.get(id(tensor))
        if entry is not None:
            return entry
        name = self.owned(tensor)
        if name is None:  # a Python number, wrapped on its way here
            return self.enter(tensor, None, None, tensor)
        meta = torch.empty(tensor.shape, dtype=self.seen_dtype(tensor.dtype), device="meta")
        entry = self.enter(tensor, weight(name), meta, None)
        self.guarded[entry.storage] = name
        self.alias(entry)
        return entry

    def seen_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a weight of ``dtype`` has in this record."""
        return self.dtype if dtype == self.own else dtype

    def alias(self, entry: Entry) -> Tensor:
        """The tensor's stand-in; views made of it count as views of the tensor."""
        symbol = entry.symbol()
        if symbol is not entry.tensor:
            begins = entry.shift + int(entry.tensor.storage_offset())
            self._aliases.setdefault(storage(symbol), (entry.storage, begins - int(symbol.storage_offset())))
        return symbol

    def stale(self, entry: Entry) -> bool:
        """Whether the tensor's storage was written to through another tensor."""
        return entry.version != self._versions[entry.storage]

    def wrote(self, entry: Entry) -> None:
        """The tensor was written to. Views of known numbers see that by themselves; views of others grow stale."""
        if entry.node is not None:
            self._symbolic.add(entry.storage)
        if entry.storage in self._symbolic:
            self._versions[entry.storage] += 1
            entry.version = self._versions[entry.storage]
            # A copy, as the tensor may be written to again.
            self._writers.setdefault(entry.storage, []).append((entry.version, replace(entry)))

    def missed(self, entry: Entry) -> list[Entry]:
        """What was written to the tensor's storage through others since it was up to date, in order."""
        writers = self._writers.get(entry.storage, [])
        entry.version, since = self._versions[entry.storage], entry.version
        return [writer for version, writer in writers if version > since]


def own_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype of a block: that of the most elements of its weights; None if it has none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def blank(dtype: torch.dtype) -> float:
    """What stands in a new tensor that nothing was written to yet, as no number that code would expect there."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 255 if dtype is torch.uint8 else -(2**20) if dtype.itemsize > 2 else -1


def shaped_like(tensor: Tensor) -> Tensor:
    """A meta tensor of the shape, strides and dtype that ``tensor`` has now."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The operands that an aten operation writes to."""
    places = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tensors(places)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors(item)]


def tensors_in(answer: Any) -> list[Tensor]:
    """Every tensor among what a block returns, in order."""
    found: list[Tensor] = []
    structured(answer, lambda value, _: found.append(value) if isinstance(value, Tensor) else None)
    return found


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor in it replaced by ``function`` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return value
