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
  stand even if the block's own code catches the exception.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_surgery.calling import Constant, structured
from moe_surgery.read.reading import Broken, Unfollowed, Unreadable
from moe_surgery.read.record.batch_size import Branches
from moe_surgery.read.record.flow import Choice, Flow, Given, Op, Ref, Route
from moe_surgery.read.record.known_numbers import LOAD, Kind, Ledger, uniform
from moe_surgery.read.record.tensor_entries import Entries, Entry, mapped, storage, tensors, tensors_in, written

# What single tokens may go through, where nothing but their shape is used in the end.
_SHAPED = frozenset("view reshape unsqueeze squeeze expand select slice detach alias t transpose permute".split())
_LIKE = {"zeros": 0.0, "ones": 1.0, "empty": float("nan")}
_READS_BACK = frozenset(
    ["_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal", "unique_dim", "_unique2"]
)


@dataclass(eq=False)
class _Choice:
    node: torch.fx.Node
    k: int
    ids: Tensor
    largest: bool
    used: bool = True


class Recorder(TorchDispatchMode):
    """Runs operations on meta tensors or, where they don't depend on the input, on real ones, and writes them down.

    ``fixed`` are sizes that don't come from the batch: those of the weights, the number of experts, top-k, and what
    the code gives as plain numbers. ``batch`` are the input's own.
    """

    def __init__(
        self, block: nn.Module, dtype: torch.dtype, route: Route, turned: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.branches = Branches(turned)
        self.dtype, self.route = dtype, route
        self.graph = torch.fx.Graph()
        self.objections: list[str] = []
        self.choices: list[_Choice] = []
        self.consts: dict[str, Tensor] = {}
        self.lenient = False
        self._paused = False
        self.positive: list[torch.fx.Node] = []
        self._reasons: dict[int, str] = {}  # by the storage of what nothing may come of
        self._unused: dict[int, _Choice] = {}  # by the storage of their ids
        self.entries = Entries(block, dtype)
        self.fixed = {1, *self.entries.sizes}
        self.batch: set[int] = set()
        self._ledger = Ledger(self.fixed, self.object_to)

    def object_to(self, reason: str) -> Unreadable:
        self.objections.append(reason)
        return Unreadable(reason)

    def input(self, shape: tuple[int, ...], strided: bool) -> Tensor:
        """The block's input; ``strided`` in its leading dimensions."""
        tensor = torch.empty(shape, dtype=self.dtype, device="meta")
        if strided:
            tensor = torch.empty((*shape[-2::-1], shape[-1]), dtype=self.dtype, device="meta")
            tensor = tensor.permute(*range(len(shape) - 2, -1, -1), len(shape) - 1)
        self.batch = {*shape[:-1], torch.Size(shape[:-1]).numel()}
        entry = self._enter(tensor, self.graph.placeholder("hidden_states"), tensor)
        self.entries.guarded[entry.storage] = "its input"
        return tensor

    def given(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The ids [T, k] and weights [T, k] that a module of experts alone is called with; ids count as chosen."""
        weights = torch.empty(ids.shape, dtype=dtype, device="meta")
        entry = self._enter(weights, self.graph.placeholder("weights"), weights)
        self.entries.guarded[entry.storage] = "its weights"
        real = ids.clone()
        entry = self.entries.enter(real, None, None, real, Kind.CHOSEN)
        self.entries.guarded[entry.storage] = "its ids"
        self.fixed.add(ids.shape[-1])
        self.choices.append(_Choice(self._entry(weights).node, ids.shape[-1], ids, True))
        return real, weights

    def symbolic(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the block's input, or is a weight of it."""
        entry = self.entries.get(tensor)
        return entry.node is not None if entry is not None else self.entries.owned(tensor) is not None

    def kind(self, tensor: Tensor) -> Kind:
        """What the numbers stand for, of a tensor on its way to Python."""
        return self._entry(tensor).kind if self.entries.get(tensor) else Kind.PLAIN

    def reason(self, tensor: Tensor) -> str | None:
        """Why nothing may come of a known tensor, if so."""
        entry = self._entry(tensor)
        return self._reasons[entry.storage] if entry.kind == Kind.LOAD else None

    def raise_kind(self, tensor: Tensor, kind: Kind) -> None:
        self._entry(tensor).raise_kind(kind)

    def uniform(self, tensor: Tensor) -> bool:
        """Whether all elements of a known tensor are the same; the question itself isn't recorded."""
        self._paused = True
        try:
            return uniform(tensor)
        finally:
            self._paused = False

    def _enter(self, tensor: Tensor, node: torch.fx.Node, meta: Tensor) -> Entry:
        node.meta["val"] = meta
        return self.entries.enter(tensor, node, meta, None)

    def _entry(self, tensor: Tensor) -> Entry:
        if tensor.is_meta and not self.entries.knows(tensor):
            raise self.object_to("it makes a tensor of numbers in a way that can't be followed")
        entry = self.entries.find(tensor, lambda name: self.graph.create_node("get_attr", name))
        if (choice := self._unused.pop(entry.storage, None)) is not None:
            choice.used = True
        if entry.node is not None:
            entry.node.meta.setdefault("val", entry.meta)
        if self.entries.stale(entry):
            for writer in self.entries.missed(entry):
                self._bring_up_to_date(entry, writer)
        return entry

    def _bring_up_to_date(self, entry: Entry, writer: Entry) -> None:
        """Write to a tensor what was written to its storage through ``writer``, as far as the two share elements."""
        if not writer.tensor.numel():
            return
        width = math.gcd(*(tensor.shape[-1] if tensor.ndim else 1 for tensor in (entry.tensor, writer.tensor)))
        mine, theirs = entry.starts(width), writer.starts(width)
        if mine is None or theirs is None:
            raise self.object_to("it writes to a tensor through a view of it, and then reads the tensor")
        place = {start: number for number, start in enumerate(mine.tolist())}
        shared = [(number, place[start]) for number, start in enumerate(theirs.tolist()) if start in place]
        if not shared:
            return
        source, target = (torch.tensor(places) for places in zip(*shared, strict=True))
        aten, shape = torch.ops.aten, list(entry.tensor.shape)
        new = self._call(aten.view.default, writer.node, [len(theirs), width])
        if len(shared) == len(mine):
            new = self._call(aten.index.Tensor, new, [self._known(source[target.argsort()])])
        else:
            old = self._call(aten.view.default, self._node(entry), [len(mine), width])
            new = self._call(aten.index.Tensor, new, [self._known(source)])
            new = self._call(aten.index_put.default, old, [self._known(target)], new)
        node = self._call(aten.view.default, new, shape)
        entry.node, entry.meta, entry.real = node, entry.symbol(), None

    def _call(self, func: Any, *args: Any) -> torch.fx.Node:
        """A functional operation that the block's code didn't ask for."""
        node = self.graph.call_function(func, args)
        node.meta["name"] = func._schema.name.split("::")[1]
        shapes = torch.fx.node.map_arg(args, lambda arg: torch.empty_like(arg.meta["val"], device="meta"))
        self._paused = True
        node.meta["val"] = func(*shapes)
        self._paused = False
        return node

    def _known(self, places: Tensor) -> torch.fx.Node:
        name = f"const_{len(self.consts)}"
        self.consts[name] = places
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = places
        return node

    def _node(self, entry: Entry) -> torch.fx.Node:
        if entry.node is not None:
            return entry.node
        assert entry.real is not None
        node = self._known(entry.real.clone())
        node.meta["val"] = self.entries.alias(entry)
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._paused:
            return func(*args, **kwargs)
        entries = {id(leaf): self._entry(leaf) for leaf in tensors((args, kwargs))}
        name = func._schema.name.split("::")[1].rstrip("_").replace("__", "")
        target = self._written(func, args, kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise self.object_to("it runs under autocast")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.object_to(f"it draws random numbers ({name})")
        if args and isinstance(args[0], Tensor):
            self._ledger.check_cut(name, args, self.symbolic(args[0]))
        single = any(entry.single for entry in entries.values())
        if single and name not in _SHAPED and not name.endswith("_like") and not name.startswith("new_"):
            raise self.object_to("it takes single tokens out of the batch")
        if any(entry.node is not None for entry in entries.values()):
            result = self._symbolic(func, name, args, kwargs, entries, target is not None)
        else:
            result = self._concrete(func, name, args, kwargs, entries)
        if target is not None:
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
        guarded = self.entries.guarded.get(self._entry(args[0]).storage)
        if guarded is not None:
            raise self.object_to(f"it writes to {guarded}")
        return args[0]

    def _concrete(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]) -> Any:
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = mapped(lambda tensor: entries[id(tensor)].real, (args, kwargs))
        kinds = {id(entry.real): entry.kind for entry in entries.values()}
        self._ledger.before(name, args)
        result = func(*args, **kwargs)
        if name.startswith(("empty", "new_empty")):
            result.fill_(float("nan") if result.is_floating_point() else -(2**20))
        made = tensors(result)
        found = [Kind.PLAIN] * len(made)
        if not (self.lenient and name in ("min", "max", "aminmax")):
            found = self._ledger.kinds(name, args, kwargs, made, lambda tensor: kinds[id(tensor)])
        dead = [self._reasons[entry.storage] for entry in entries.values() if entry.kind == Kind.LOAD]
        reason = (dead or [self._ledger.reason])[0]
        for leaf, kind in zip(made, found, strict=True):
            if kind == Kind.LOAD:
                self._reasons.setdefault(storage(leaf), reason)
            if self.entries.get(leaf) is None:
                self.entries.enter(leaf, None, None, leaf, kind)
            else:
                self.raise_kind(leaf, kind)
        return result

    def _symbolic(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry], in_place: bool) -> Any:
        if (known := self._by_support(func, name, args, entries)) is not None:
            return known
        if name in _READS_BACK:
            raise self.object_to(f"what it does depends on the values it computes ({name})")
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        objection = self._objection(name, [*args, *kwargs.values()], entries)
        if name in ("index", "index_put"):  # a mask has no meta result; the places it selects do
            args = (args[0], [_selected(entries.get(id(index)), index) for index in args[1]], *args[2:])
            args = (args[0], [index for group in args[1] for index in group], *args[2:])
            for index in args[1]:
                if isinstance(index, Tensor) and id(index) not in entries:
                    entries[id(index)] = self.entries.enter(index, None, None, index, Kind.COUNT)
        metas = mapped(lambda tensor: self.entries.alias(entries[id(tensor)]), (args, kwargs))
        if name == "topk":
            _check_top_k(*args[:3])
        result = func(*metas[0], **metas[1])
        key = name.removeprefix("new_").removesuffix("_like")
        if key != name and key in (*_LIKE, "full"):
            real = torch.empty(result.shape, dtype=result.dtype)
            real.fill_(_LIKE[key] if key in _LIKE else args[-1])
            self.entries.enter(real, None, None, real)
            return real
        nodes = mapped(lambda tensor: self._node(entries[id(tensor)]), (args, kwargs))
        record = self.graph.call_function(func, *nodes)
        record.meta["name"] = name
        if objection:
            record.meta["objection"] = objection
        ranking = self._ranking(name, args, kwargs)
        support = self._support(func, name, args, kwargs, entries)
        if in_place:
            entry = entries[id(args[0])]
            entry.node, entry.meta, entry.real = record, result, None
            record.meta["val"] = result
            entry.support, entry.positive = support
            return args[0]
        if name == "argmax" and ranking is not None:
            return self._choose(record, result, ranking)
        single = self._ledger.single(name, args) or any(entry.single for entry in entries.values())
        if isinstance(result, Tensor):
            entry = self._enter(result, record, result)
            entry.single = single
            entry.support, entry.positive = support
            return result
        parts = []
        for place, part in enumerate(result):
            item = self.graph.call_function(operator.getitem, (record, place))
            self._enter(part, item, part).single = single
            parts.append(part)
        if ranking is not None:
            parts[1] = self._choose(record, parts[1], ranking)
        return type(result)(parts) if isinstance(result, list) else tuple(parts)

    def _support(
        self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]
    ) -> tuple[Tensor | None, Any]:
        """Where the result may be other than zero, and what stands there, if weights were put among zeros."""
        first = entries.get(id(args[0])) if args else None
        if name == "scatter" and first is not None and first.real is not None and not bool(first.real.any()):
            index, source = entries.get(id(args[2])), entries.get(id(args[3]))
            if index is not None and index.kind == Kind.CHOSEN and source is not None and source.node is not None:
                zeros = torch.zeros(first.real.shape, dtype=torch.bool)
                return zeros.scatter(args[1], index.real, torch.ones(index.real.shape, dtype=torch.bool)), source.node
        if name in _SHAPED and first is not None and first.support is not None:
            return func(first.support, *args[1:], **kwargs), first.positive
        return None, None

    def _by_support(self, func: Any, name: str, args: Any, entries: dict[int, Entry]) -> Tensor | None:
        """Where weights are that were put among zeros, asked of the tensor that they were put in."""
        first = entries.get(id(args[0]))
        if first is None or first.support is None:
            return None
        number = args[1] if len(args) > 1 and isinstance(args[1], (int, float)) else None
        if not (name == "nonzero" or (name in ("gt", "ne") and number == 0)):
            return None
        if first.positive not in self.positive:
            self.positive.append(first.positive)
        real = first.support.nonzero() if name == "nonzero" else first.support.clone()
        self.entries.enter(real, None, None, real, Kind.COUNT if name == "nonzero" else Kind.CHOSEN)
        return real

    def _objection(self, name: str, operands: list[Any], entries: dict[int, Entry]) -> str | None:
        """Why nothing may come of an operation on the input, if so."""
        for entry in entries.values():
            if entry.kind == Kind.LOAD:
                return self._reasons[entry.storage]
        values = self._ledger.takes_values(name, operands, lambda tensor: entries[id(tensor)].kind)
        return f"what it computes depends on {LOAD} ({name})" if values else None

    def _ranking(self, name: str, args: Any, kwargs: Any) -> tuple[int, bool] | None:
        """How many an operation takes of the highest, and whether it is of the highest, if its indices are a choice.

        That is a top-k; and a maximum or a descending sort, if anything comes of their indices.
        """
        if name == "topk":
            k, dim, largest = (*args[1:4], *(-1, True)[len(args) - 2 :])[:3]
            if dim not in (-1, args[0].ndim - 1):
                raise self.object_to("it ranks along another dimension than the last")
            return k, largest
        if name not in ("max", "argmax", "sort") or self.route is no_choice or not args[0].ndim:
            return None
        dim = args[1] if len(args) > 1 else kwargs.get("dim", -1 if name == "sort" else None)
        size = args[0].shape[-1]
        if dim not in (-1, args[0].ndim - 1) or size in self.batch or args[0].ndim < 2:
            return None
        if name == "sort":
            descending = args[2] if len(args) > 2 else kwargs.get("descending", False)
            return (size, True) if descending else None
        return 1, True

    def _choose(self, record: torch.fx.Node, indices: Tensor, ranking: tuple[int, bool]) -> Tensor:
        scores: Any = record.args[0]
        shape = scores.meta["val"].shape
        k, largest = ranking
        # Not the same ids for two choices of one size, so that each is told by its own.
        ids = (self.route(shape[:-1].numel(), shape[-1], k) + len(self.choices)) % shape[-1]
        self.fixed.update((k, shape[-1]))
        choice = _Choice(scores, k, ids, largest, used=record.meta["name"] == "topk")
        self.choices.append(choice)
        record.meta["choice"] = choice
        real = ids.reshape(indices.shape).clone()
        entry = self.entries.enter(real, None, None, real, Kind.CHOSEN)
        self._unused[entry.storage] = choice
        return real

    def flow(self, answer: Any, shape: tuple[int, ...]) -> Flow:
        output = self._output(answer, shape)
        entry = self._entry(output)
        if entry.node is None:
            raise self.object_to("its output doesn't depend on its input")
        results = structured(answer, lambda value, where: self._result(value, where, output))
        positive = self.positive
        more = [leaf.value for leaf in results.leaves() if isinstance(leaf, Given)] if answer is not output else []
        needed, waiting = set(), [entry.node, *(choice.node for choice in self._made())]
        waiting += [node for node in [*more, *positive] if isinstance(node, torch.fx.Node)]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                if "objection" in node.meta:
                    raise self.object_to(node.meta["objection"])
                needed.add(node)
                waiting += node.all_input_nodes
        kept = [node for node in self.graph.nodes if node in needed]
        index = {node: Ref(place) for place, node in enumerate(kept)}
        ops = tuple(self._op(node, index) for node in kept)
        choices = tuple(Choice(index[choice.node], choice.k, choice.ids, choice.largest) for choice in self._made())
        found = Flow(
            ops,
            index[entry.node],
            choices,
            branches=tuple(self.branches.met),
            lone=self.branches.lone,
            positive=tuple(index[node] for node in positive),
            used=frozenset(self.entries.used),
        )
        if answer is output:
            return found

        def placed(leaf: Any) -> Any:
            known = isinstance(leaf, Given) and isinstance(leaf.value, torch.fx.Node)
            return replace(leaf, value=index[leaf.value]) if known else leaf

        return replace(found, results=results.mapped(placed))

    def _made(self) -> list[_Choice]:
        """The choices that anything came of."""
        return [choice for choice in self.choices if choice.used]

    def _output(self, answer: Any, shape: tuple[int, ...]) -> Tensor:
        """The first of the returned tensors that is like the input."""
        found = tensors_in(answer)
        if not found:
            raise self.object_to(f"it returns a {type(answer).__name__}, not one tensor")
        for output in found:
            alike = output.shape[-1:] == shape[-1:] and output.numel() == torch.Size(shape).numel()
            fits = tuple(output.shape) == shape or (alike and (self.route is no_choice or answer is not output))
            if fits and output.dtype == self.dtype:
                return output
        first = found[0]
        reason = f"its output is {tuple(first.shape)} {first.dtype}, its input {shape} {self.dtype}"
        raise Unfollowed(reason, len(self.graph.nodes), answered=True)

    def constant(self, value: Tensor) -> Constant | None:
        """What a tensor is that doesn't depend on the input and is the same in all of its elements."""
        entry, shape = self._entry(value), tuple(value.shape)
        known = entry.real if entry.kind == Kind.PLAIN and value.numel() else None
        if known is None or not self.uniform(known) or not all(size in self.fixed for size in shape):
            return None
        dtypes = {str(value.dtype).removeprefix("torch."), *(["native"] if value.dtype == self.dtype else [])}
        return Constant(float(known.reshape(-1)[0]), shape, frozenset(dtypes))

    def _result(self, value: Any, where: str, output: Tensor) -> Any:
        """One leaf of what the block returns: its output, another tensor, or what is the same in every call."""
        if value is output:
            return Given(where, None, tuple(value.shape), "")
        if isinstance(value, Tensor):
            entry = self._entry(value)
            shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
            if (same := self.constant(value)) is not None:
                return same
            if entry.node is not None:
                return Given(where, entry.node, shape, dtype)
            if entry.kind == Kind.CHOSEN:
                return Given(where, entry.real, shape, dtype)
            raise self.object_to(f"it also returns ({where}) {LOAD}")
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise self.object_to(f"it also returns ({where}) a {type(value).__name__}")

    def _op(self, node: torch.fx.Node, index: dict[torch.fx.Node, Ref]) -> Op:
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
        if node.op == "placeholder":
            return Op("input", (node.target,), {}, shape, dtype)
        if node.op == "get_attr":
            const = self.consts.get(str(node.target))
            if const is None:
                return Op("param", (str(node.target),), {}, shape, dtype)
            return Op("const", (const,), {}, shape, dtype)
        operands: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: index[arg])  # type: ignore[arg-type, return-value]
        name = "item" if node.target is operator.getitem else node.meta["name"]
        made = self._made()
        chosen = {"choice": made.index(node.meta["choice"])} if node.meta.get("choice") in made else {}
        return Op(name, tuple(operands[0]), {**operands[1], **chosen}, shape, dtype)


def _selected(entry: Entry | None, index: Any) -> list[Any]:
    if entry is None or entry.real is None or entry.real.dtype not in (torch.bool, torch.uint8):
        return [index]
    return list(entry.real.nonzero().unbind(1))


def _check_top_k(scores: Tensor, k: int, dim: int = -1) -> None:
    count = scores.shape[dim] if scores.ndim else 1
    if not 1 <= k <= count:
        raise Broken(f"it asks for the top {k} of {count}, so it can't run")


def no_choice(rows: int, choices: int, k: int) -> Tensor:
    """The route of a module of experts alone."""
    raise Unreadable("its experts choose among themselves")
