"""Writing down what a block does in one run on meta tensors, as a torch.fx graph of aten operations.

Nothing is decided by names or classes. The block's own forward runs, whatever it is (a method, a closure patched onto
the instance, code from elsewhere), with an input that has a shape but no data; every operation on that input is
recorded, in a :class:`~.notebook.Notebook`. Two things make control flow safe to follow:

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
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_surgery.read.reading import VALUES
from moe_surgery.read.record.choices import any_places, check_top_k, choose, look_up, looked_up, no_choice, ranking
from moe_surgery.read.record.drawn import check_drawn, may_be_drawn
from moe_surgery.read.record.finite import asks_finite
from moe_surgery.read.record.known_numbers import LOAD, Kind
from moe_surgery.read.record.lineage import done
from moe_surgery.read.record.masks import as_index, by_places, check_places
from moe_surgery.read.record.meta_results import MetaResults
from moe_surgery.read.record.notebook import Notebook
from moe_surgery.read.record.tensor_entries import Entry, blank, mapped, shaped_like, storage, tensors, written
from moe_surgery.read.record.zeros import SHAPED, asked_of_support, support

_LIKE = {"zeros": 0.0, "ones": 1.0}
_READS_BACK = frozenset(
    ["_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal", "unique_dim", "_unique2"]
)


class Recorder(TorchDispatchMode):
    """Runs operations on meta tensors or, where they don't depend on the input, on real ones, and writes them down."""

    def __init__(self, notebook: Notebook) -> None:
        super().__init__()
        self.notebook = notebook
        self._results = MetaResults()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        notebook, kwargs = self.notebook, dict(kwargs or {})
        if notebook.paused:
            return func(*args, **kwargs)
        entries = {id(leaf): notebook.entry(leaf) for leaf in tensors((args, kwargs))}
        name = func._schema.name.split("::")[1].rstrip("_").replace("__", "")
        target = self._written(func, args, kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise notebook.object_to("it runs under autocast")
        if torch.is_inference_mode_enabled():
            raise notebook.object_to("it runs under torch.inference_mode, which leaves no record of its operations")
        if torch.Tag.nondeterministic_seeded in func.tags and not may_be_drawn(name, entries):
            raise notebook.object_to(f"it draws random numbers ({name})")
        if args and isinstance(args[0], Tensor):
            notebook.ledger.check_cut(name, args, notebook.symbolic(args[0]))
        single = any(entry.single for entry in entries.values())
        if single and name not in SHAPED and not name.endswith("_like") and not name.startswith("new_"):
            notebook.one_by_one = True
        if any(entry.node is not None for entry in entries.values()):
            result = self._symbolic(func, name, args, kwargs, entries, target is not None)
        else:
            result = self._concrete(func, name, args, kwargs, entries)
        if target is not None:
            if torch.Tag.inplace_view not in func.tags:
                notebook.entries.wrote(entries[id(target)])
            return target
        return result

    def _written(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The operand that an operation writes to, if it may."""
        notebook = self.notebook
        targets = written(func, args, kwargs)
        if not targets:
            return None
        if len(targets) != 1 or targets[0] is not args[0]:
            raise notebook.object_to(f"{func} writes to an argument")
        guarded = notebook.entries.guarded.get(notebook.entry(args[0]).storage)
        if guarded is None:
            return args[0]
        if notebook.entries.vectors.get(guarded) is not args[0] or notebook.route is no_choice:
            raise notebook.object_to(f"it writes to {guarded}")
        notebook.changed[guarded] = None
        return args[0]

    def _concrete(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry]) -> Any:
        notebook = self.notebook
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        origins = notebook.lineage.origins((args, kwargs))
        args, kwargs = mapped(lambda tensor: entries[id(tensor)].real, (args, kwargs))
        kinds = {id(entry.real): entry.kind for entry in entries.values()}
        notebook.ledger.before(name, args, notebook.by_batch)
        result = func(*args, **kwargs) if notebook.entries.device.type == "cpu" else done(func, args, kwargs)
        if name.startswith(("empty", "new_empty")):
            result.fill_(blank(result.dtype))
        notebook.lineage.made(func, origins, result)
        made = tensors(result)
        found = [Kind.PLAIN] * len(made)
        alike = torch.Tag.pointwise in func.tags and not any(kinds.values())
        if not (alike or (notebook.lenient and name in ("min", "max", "aminmax"))):
            found = notebook.ledger.kinds(name, args, kwargs, made, lambda tensor: kinds[id(tensor)])
        dead = [notebook.reasons[entry.storage] for entry in entries.values() if entry.kind == Kind.LOAD]
        reason = (dead or [notebook.ledger.reason])[0]
        for leaf, kind in zip(made, found, strict=True):
            if kind == Kind.LOAD:
                notebook.reasons.setdefault(storage(leaf), reason)
            if notebook.entries.get(leaf) is None:
                notebook.entries.enter(leaf, None, None, leaf, kind)
            else:
                notebook.raise_kind(leaf, kind)
        return result

    def _symbolic(self, func: Any, name: str, args: Any, kwargs: Any, entries: dict[int, Entry], in_place: bool) -> Any:
        notebook = self.notebook
        if (known := asked_of_support(notebook, func, name, args, kwargs, entries)) is not None:
            return known
        func, name, args = as_index(func, name, args, entries)
        if name in _READS_BACK:
            if asks_finite(entries[id(args[0])].node):
                raise notebook.object_to(
                    "it asks whether what it computes is finite, and does otherwise where it isn't"
                )
            raise notebook.object_to(f"{VALUES} ({name})")
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        objection = self._objection(name, [*args, *kwargs.values()], entries)
        if name in ("index", "index_put"):
            args = (args[0], by_places(args[1], entries, notebook.entries, notebook.lineage), *args[2:])
            check_places(args[0], args[1], entries)
        metas = mapped(lambda tensor: notebook.entries.alias(entries[id(tensor)]), (args, kwargs))
        if torch.Tag.inplace_view in func.tags:  # the same tensor gets another shape; what made it gave the one it had
            notebook.node(entries[id(args[0])]).meta["val"] = shaped_like(metas[0][0])
        if name == "topk":
            check_top_k(*args[:3])
        try:
            result = self._results.of(func, *metas)
        except NotImplementedError as error:  # how many there are depends on values, as where a mask is an index
            raise notebook.object_to(f"{VALUES} ({name})") from error
        key = name.removeprefix("new_").removesuffix("_like")
        if key != name and key in (*_LIKE, "empty", "full"):
            real = torch.empty(result.shape, dtype=result.dtype)
            fill = _LIKE[key] if key in _LIKE else args[-1] if key == "full" else blank(result.dtype)
            real.fill_(fill)
            notebook.lineage.full(real, fill)
            notebook.entries.enter(real, None, None, real)
            return real
        nodes = mapped(lambda tensor: notebook.node(entries[id(tensor)]), (args, kwargs))
        record = notebook.graph.call_function(func, *nodes)
        record.meta["name"] = name
        if objection:
            record.meta["objection"] = objection
        check_drawn(notebook, record, args, entries)
        ranked = ranking(notebook, name, args, kwargs)
        one = isinstance(result, Tensor)
        kept = support(func, name, args, kwargs, entries, result.shape) if one and not in_place else None
        if in_place:
            entry = entries[id(args[0])]
            entry.node, entry.meta, entry.real = record, result, None
            record.meta["val"] = result
            entry.support = kept
            return args[0]
        if name == "argmax" and ranked is not None:
            return choose(notebook, record, result, ranked)
        if looked_up(notebook, name, args, entries) and (found := look_up(notebook, record, result)) is not None:
            return found
        single = notebook.ledger.single(name, args) or any(entry.single for entry in entries.values())
        if isinstance(result, Tensor):
            entry = notebook.enter(result, record, result)
            entry.single = single
            entry.support = kept
            return result
        parts = []
        for place, part in enumerate(result):
            item = notebook.graph.call_function(operator.getitem, (record, place))
            notebook.enter(part, item, part).single = single
            parts.append(part)
        if ranked is not None:
            parts[1] = choose(notebook, record, parts[1], ranked)
        elif name == "topk":
            parts[1] = any_places(notebook, parts[1], args[2])
        return type(result)(parts) if isinstance(result, list) else tuple(parts)

    def _objection(self, name: str, operands: list[Any], entries: dict[int, Entry]) -> str | None:
        """Why nothing may come of an operation on the input, if so."""
        notebook = self.notebook
        if notebook.scaled is not None:
            return notebook.scaled
        for entry in entries.values():
            if entry.kind == Kind.LOAD:
                return notebook.reasons[entry.storage]
        values = notebook.ledger.takes_values(name, operands, lambda tensor: entries[id(tensor)].kind)
        return f"what it computes depends on {LOAD} ({name})" if values else None
