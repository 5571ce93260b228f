"""Writing down what a block does in one run on meta tensors, as a torch.fx graph of aten operations.

Nothing is decided by names or classes. The block's own forward runs, whatever it is (a method, a closure patched onto
the instance, code from elsewhere), with an input that has a shape but no data; every operation on that input is
recorded. Two things make control flow safe to follow:

* The indices that a top-k returns are real numbers chosen by the caller (``Route``). Loops over experts, masks and
  sorts then run as they would on data, and the record shows which weights met which token. What known numbers stand
  for is tracked (:mod:`~moe_surgery.read.record.known_numbers`).
* Sizes that come from the batch are marked. Code that compares such a size with a number branches on the batch size,
  which one record can't show; this, and everything else that a record can't hold (random numbers, a value read back
  to Python, a write to the input or to a weight, a tensor from outside), is written down as an objection. Objections
  stand even if the block's own code catches the exception. A write to a buffer of the block is none yet: what it is
  changed to is one of the results.
"""

from __future__ import annotations

import operator
from functools import cached_property
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_surgery.read.counts import totals
from moe_surgery.read.reading import VALUES, Mistaken, Unreadable
from moe_surgery.read.record.batch_size import BatchSize
from moe_surgery.read.record.branches import Branches
from moe_surgery.read.record.choices import (
    Choices,
    any_places,
    check_top_k,
    choose,
    look_up,
    looked_up,
    no_choice,
    ranking,
)
from moe_surgery.read.record.finite import asks_finite
from moe_surgery.read.record.flow import Route
from moe_surgery.read.record.known_numbers import LOAD, Kind, Ledger, uniform
from moe_surgery.read.record.lineage import Lineage, done
from moe_surgery.read.record.masks import as_index, by_places, check_places
from moe_surgery.read.record.meta_results import MetaResults
from moe_surgery.read.record.tensor_entries import Entries, Entry, blank, mapped, shaped_like, storage, tensors, written
from moe_surgery.read.record.views import bring_up_to_date
from moe_surgery.read.record.zeros import SHAPED, asked_of_support, support

_LIKE = {"zeros": 0.0, "ones": 1.0}
_READS_BACK = frozenset(
    ["_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal", "unique_dim", "_unique2"]
)


class Recorder(TorchDispatchMode):
    """Runs operations on meta tensors or, where they don't depend on the input, on real ones, and writes them down.

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
        super().__init__()
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
        self._reasons: dict[int, str] = {}  # by the storage of what nothing may come of
        self.entries = Entries(block, dtype)
        self.fixed = {1, *self.entries.sizes}
        self.batch: set[int] = set()
        self.tokens = 0
        self.mistaken: set[int] = set()  # sizes of the batch that the code also gives as plain numbers
        self.ledger = Ledger(self.fixed, self.object_to)
        self.ledger.whole = route is no_choice
        self.lineage = Lineage()
        self._results = MetaResults()
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
        return self._reasons[entry.storage] if entry.kind == Kind.LOAD else None

    def raise_kind(self, tensor: Tensor, kind: Kind) -> None:
        self.entry(tensor).raise_kind(kind)

    def limit(self, size: BatchSize) -> Tensor:
        """A number of tokens as a known tensor, which known tensors are compared with."""
        self.paused = True
        try:
            tensor = torch.tensor(int.__index__(size))
        finally:
            self.paused = False
        self.entries.enter(tensor, None, None, tensor, Kind.COUNT if size.pure else Kind.DERIVED)
        if size.pure and size.of_batch:
            self.lineage.full(tensor, int.__index__(size))
        if size.pure:
            self.ledger.limits[id(tensor)] = size.of_batch
            self._limits.append(tensor)
        return tensor

    def uniform(self, tensor: Tensor) -> bool:
        """Whether all elements of a known tensor are the same; the question itself isn't recorded."""
        self.paused = True
        try:
            return uniform(tensor)
        finally:
            self.paused = False

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.paused:
            return func(*args, **kwargs)
        entries = {id(leaf): self.entry(leaf) for leaf in tensors((args, kwargs))}
        name = func._schema.name.split("::")[1].rstrip("_").replace("__", "")
        target = self._written(func, args, kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise self.object_to("it runs under autocast")
        if torch.is_inference_mode_enabled():
            raise self.object_to("it runs under torch.inference_mode, which leaves no record of its operations")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.object_to(f"it draws random numbers ({name})")
        if args and isinstance(args[0], Tensor):
            self.ledger.check_cut(name, args, self.symbolic(args[0]))
        single = any(entry.single for entry in entries.values())
        if single and name not in SHAPED and not name.endswith("_like") and not name.startswith("new_"):
            self.one_by_one = True
        if any(entry.node is not None for entry in entries.values()):
            result = self._symbolic(func, name, args, kwargs, entries, target is not None)
        else:
            result = self._concrete(func, name, args, kwargs, entries)
        if target is not None:
            if torch.Tag.inplace_view not in func.tags:
                self.entries.wrote(entries[id(target)])
            return target
        return result

    def _written(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The operand that an operation writes to, if it may."""
        targets = written(func, args, kwargs)
        if not targets:
            return None
        if len(targets) != 1 or targets[0] is not args[0]:
            raise self.object_to(f"{func} writes to an argument")
        guarded = self.entries.guarded.get(self.entry(args[0]).storage)
        if guarded is None:
            return args[0]
        if self.entries.vectors.get(guarded) is not args[0] or self.route is no_choice:
            raise self.object_to(f"it writes to {guarded}")
        self.changed[guarded] = None
        return args[0]

    def _concrete(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        origins = self.lineage.origins((args, kwargs))
        args, kwargs = mapped(lambda tensor: entries[id(tensor)].real, (args, kwargs))
        kinds = {id(entry.real): entry.kind for entry in entries.values()}
        self.ledger.before(name, args, self.by_batch)
        result = func(*args, **kwargs) if self.entries.device.type == "cpu" else done(func, args, kwargs)
        if name.startswith(("empty", "new_empty")):
            result.fill_(blank(result.dtype))
        self.lineage.made(func, origins, result)
        made = tensors(result)
        found = [Kind.PLAIN] * len(made)
        alike = torch.Tag.pointwise in func.tags and not any(kinds.values())
        if not (alike or (self.lenient and name in ("min", "max", "aminmax"))):
            found = self.ledger.kinds(name, args, kwargs, made, lambda tensor: kinds[id(tensor)])
        dead = [self._reasons[entry.storage] for entry in entries.values() if entry.kind == Kind.LOAD]
        reason = (dead or [self.ledger.reason])[0]
        for leaf, kind in zip(made, found, strict=True):
            if kind == Kind.LOAD:
                self._reasons.setdefault(storage(leaf), reason)
            if self.entries.get(leaf) is None:
                self.entries.enter(leaf, None, None, leaf, kind)
            else:
                self.raise_kind(leaf, kind)
        return result

    def _symbolic(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry], in_place: bool) -> Any:
        if (known := asked_of_support(self, func, name, args, kwargs, entries)) is not None:
            return known
        func, name, args = as_index(func, name, args, entries)
        if name in _READS_BACK:
            if asks_finite(entries[id(args[0])].node):
                raise self.object_to("it asks whether what it computes is finite, and does otherwise where it isn't")
            raise self.object_to(f"{VALUES} ({name})")
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        objection = self._objection(name, [*args, *kwargs.values()], entries)
        if name in ("index", "index_put"):
            args = (args[0], by_places(args[1], entries, self.entries), *args[2:])
            check_places(args[0], args[1], entries)
        metas = mapped(lambda tensor: self.entries.alias(entries[id(tensor)]), (args, kwargs))
        if torch.Tag.inplace_view in func.tags:  # the same tensor gets another shape; what made it gave the one it had
            self.node(entries[id(args[0])]).meta["val"] = shaped_like(metas[0][0])
        if name == "topk":
            check_top_k(*args[:3])
        try:
            result = self._results.of(func, *metas)
        except NotImplementedError as error:  # how many there are depends on values, as where a mask is an index
            raise self.object_to(f"{VALUES} ({name})") from error
        key = name.removeprefix("new_").removesuffix("_like")
        if key != name and key in (*_LIKE, "empty", "full"):
            real = torch.empty(result.shape, dtype=result.dtype)
            fill = _LIKE[key] if key in _LIKE else args[-1] if key == "full" else blank(result.dtype)
            real.fill_(fill)
            self.lineage.full(real, fill)
            self.entries.enter(real, None, None, real)
            return real
        nodes = mapped(lambda tensor: self.node(entries[id(tensor)]), (args, kwargs))
        record = self.graph.call_function(func, *nodes)
        record.meta["name"] = name
        if objection:
            record.meta["objection"] = objection
        ranked = ranking(self, name, args, kwargs)
        one = isinstance(result, Tensor)
        kept = support(func, name, args, kwargs, entries, result.shape) if one and not in_place else None
        if in_place:
            entry = entries[id(args[0])]
            entry.node, entry.meta, entry.real = record, result, None
            record.meta["val"] = result
            entry.support = kept
            return args[0]
        if name == "argmax" and ranked is not None:
            return choose(self, record, result, ranked)
        if looked_up(self, name, args, entries) and (found := look_up(self, record, result)) is not None:
            return found
        single = self.ledger.single(name, args) or any(entry.single for entry in entries.values())
        if isinstance(result, Tensor):
            entry = self.enter(result, record, result)
            entry.single = single
            entry.support = kept
            return result
        parts = []
        for place, part in enumerate(result):
            item = self.graph.call_function(operator.getitem, (record, place))
            self.enter(part, item, part).single = single
            parts.append(part)
        if ranked is not None:
            parts[1] = choose(self, record, parts[1], ranked)
        elif name == "topk":
            parts[1] = any_places(self, parts[1], args[2])
        return type(result)(parts) if isinstance(result, list) else tuple(parts)

    def _objection(self, name: str, operands: list[Any], entries: dict[int, Entry]) -> str | None:
        """Why nothing may come of an operation on the input, if so."""
        if self.scaled is not None:
            return self.scaled
        for entry in entries.values():
            if entry.kind == Kind.LOAD:
                return self._reasons[entry.storage]
        values = self.ledger.takes_values(name, operands, lambda tensor: entries[id(tensor)].kind)
        return f"what it computes depends on {LOAD} ({name})" if values else None
