"""What is known while a block is recorded: its graph of operations, its tensors, and what is objected to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.fx
from torch import Tensor, nn

from moe_surgery.read.counts import totals
from moe_surgery.read.reading import Mistaken, Unreadable
from moe_surgery.read.record.batch_size import BatchSize
from moe_surgery.read.record.branches import Branches
from moe_surgery.read.record.choices import Choices, no_choice
from moe_surgery.read.record.flow import Route
from moe_surgery.read.record.known_numbers import Kind, Ledger, uniform
from moe_surgery.read.record.lineage import Lineage
from moe_surgery.read.record.tensor_entries import Entries, Entry
from moe_surgery.read.record.views import bring_up_to_date


class Notebook:
    """What one run of a ``block``, with weights as if of ``dtype``, has shown so far.

    ``fixed`` are sizes that don't come from the batch: those of the weights, the number of experts, top-k, and what
    the code gives as plain numbers. ``batch`` are the input's own, and ``tokens`` how many it has.
    With ``inside``, what is ranked of masked scores is chosen among those that no mask covers; ``outside`` says that
    some were not.
    """

    def __init__(
        self,
        block: nn.Module,
        dtype: torch.dtype,
        route: Route,
        turned: frozenset[str] = frozenset(),
        inside: bool = False,
    ) -> None:
        self._block, self.branches = block, Branches(turned)
        self.dtype, self.route = dtype, route
        self.inside, self.outside = inside, False
        self.graph = torch.fx.Graph()
        self.objections: list[str] = []
        self.reservations: list[str] = []  # which stand if the block's own code doesn't fail further on
        self.choices = Choices(route)
        self.consts: dict[str, Tensor] = {}
        self.lenient = False
        self.paused = False
        self.one_by_one = False
        self.by_batch = False
        self.scaled: str | None = None
        self.positive: list[tuple[torch.fx.Node, Tensor]] = []
        self.changed: dict[str, None] = {}  # buffers of the block
        self.reasons: dict[int, str] = {}  # by the storage of what nothing may come of
        self.entries = Entries(block, dtype)
        self.fixed = {1, *self.entries.sizes}
        self.batch: set[int] = set()
        self.tokens = 0
        self.mistaken: set[int] = set()  # sizes of the batch that the code also gives as plain numbers
        self.ledger = Ledger(self.fixed, self.object_to)
        self.ledger.whole = route is no_choice
        self.lineage = Lineage()
        self._limits: list[Tensor] = []  # kept alive, as they are told by identity

    @cached_property
    def counts(self) -> list[int]:
        """How many experts there may be."""
        return totals(self._block, dict(self._block.named_parameters()))

    def unreadable(self) -> Unreadable:
        """The first objection."""
        first = (*self.reservations, *self.objections)[0]
        return Mistaken(first, self.mistaken) if self.mistaken else Unreadable(first)

    def object_to(self, reason: str) -> Unreadable:
        self.objections.append(reason)
        return Unreadable(reason)

    def symbolic(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the block's input, or is a weight of it."""
        entry = self.entries.get(tensor)
        return entry.node is not None if entry is not None else self.entries.owned(tensor) is not None

    def kind(self, tensor: Tensor) -> Kind:
        """What the numbers stand for, of a tensor on its way to Python."""
        return self.entry(tensor).kind if self.entries.get(tensor) else Kind.PLAIN

    def reason(self, tensor: Tensor) -> str | None:
        """Why nothing may come of a known tensor, if so."""
        entry = self.entry(tensor)
        return self.reasons[entry.storage] if entry.kind == Kind.LOAD else None

    def raise_kind(self, tensor: Tensor, kind: Kind) -> None:
        self.entry(tensor).raise_kind(kind)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Operations in it are run and not recorded."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def limit(self, size: BatchSize) -> Tensor:
        """A number of tokens as a known tensor, which known tensors are compared with."""
        with self.unrecorded():
            tensor = torch.tensor(int.__index__(size))
        self.entries.enter(tensor, None, None, tensor, Kind.COUNT if size.pure else Kind.DERIVED)
        if size.pure and size.of_batch:
            self.lineage.full(tensor, int.__index__(size))
        if size.pure:
            self.ledger.limits[id(tensor)] = size.of_batch
            self._limits.append(tensor)
        return tensor

    def uniform(self, tensor: Tensor) -> bool:
        """Whether all elements of a known tensor are the same; the question itself isn't recorded."""
        with self.unrecorded():
            return uniform(tensor)

    def enter(self, tensor: Tensor, node: torch.fx.Node, meta: Tensor) -> Entry:
        """Take down that ``node`` makes ``tensor``, which is ``meta`` without its numbers."""
        node.meta["val"] = meta
        return self.entries.enter(tensor, node, meta, None)

    def entry(self, tensor: Tensor) -> Entry:
        """What is known of a tensor, as it is now."""
        if tensor.is_meta and not self.entries.knows(tensor):
            raise self.object_to("it makes a tensor of numbers in a way that can't be followed")
        entry = self.entries.find(tensor, lambda name: self.graph.create_node("get_attr", name))
        self.choices.read(entry.storage)
        if entry.node is not None:
            entry.node.meta.setdefault("val", entry.meta)
        if self.entries.stale(entry):
            for writer in self.entries.missed(entry):
                bring_up_to_date(self, entry, writer)
        return entry

    def known(self, places: Tensor) -> torch.fx.Node:
        """Known numbers as part of the record."""
        name = f"const_{len(self.consts)}"
        self.consts[name] = places
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = places
        return node

    def node(self, entry: Entry) -> torch.fx.Node:
        """Where a tensor was made, or known numbers as part of the record."""
        if entry.node is not None:
            return entry.node
        assert entry.real is not None
        node = self.known(entry.real.clone())
        node.meta["origin"] = self.lineage.of(entry.tensor)
        node.meta["val"] = self.entries.alias(entry)
        return node
