"""The ledger of a load: which tensor of the checkpoint went where in the blocks to be swapped, and whether all did.

vLLM's own check asks whether a parameter was named, and nothing of quantised models; it doesn't see an expert that is
missing from a stacked parameter, one that is loaded twice, or a tensor that nobody took. Here every call of a
parameter's ``weight_loader`` is written down, and what isn't written to stays blank (``blanks.py``): weights, scales
and zero points alike. The model's own loader runs as it is, on the tree that it was written for.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.blanks import blank, make_blank, zero
from moe_surgery.errors import LedgerError

_LISTED = 4


@dataclass(eq=False)
class _Sink:
    """One parameter of a block to be swapped, and the loads it has seen: what part of it, from which tensor.

    ``blank``: whether it was made so. ``before`` is what stood in it before, where it may be left without a load.
    ``sizes`` says of how many elements each was, of which one goes to no more than ``spread`` places.
    """

    name: str
    parameter: Tensor
    numel: int
    spread: int = 1
    loads: dict[tuple[Any, ...], str] = field(default_factory=dict)
    sizes: dict[tuple[Any, ...], int] = field(default_factory=dict)
    blank: bool = False
    before: Tensor | None = None


class Ledger:
    """Watches the parameters of ``blocks`` (by path in the model) while weights are loaded. ``close`` ends it.

    With ``known`` what is loaded may be a part, of whole parameters: those that nothing was written to are left out of
    the books, and buffers are in them. A tensor that none of them takes must then be among the ``known`` names.
    ``written`` are those that something was loaded into, once it is closed.
    """

    def __init__(self, blocks: dict[str, nn.Module], known: Set[str] | None = None) -> None:
        self._known = known
        self._sinks: list[_Sink] = []
        self._idle: set[str] = set()
        self._elsewhere: set[str] = set()
        self._problems: list[str] = []
        self._current = "?"
        self._sources = _Sources()
        self._seen: Counter[str] = Counter()
        self._used: dict[str, str] = {}
        self._restores: list[Callable[[], None]] = []
        self.opened = False
        self.written: list[Tensor] = []
        for path, block in blocks.items():
            finer = _finer(block, path)
            for name, parameter in block.named_parameters(prefix=path):
                self._watch(path, name, parameter, finer.get(name.rpartition(".")[0], 1))
            if known is not None:
                for name, buffer in block.named_buffers(prefix=path):
                    self._watch(path, name, buffer)

    def _watch(self, path: str, name: str, parameter: Tensor, spread: int = 1) -> None:
        sink = _Sink(name, parameter, int(getattr(parameter, "weight_loader_numel", parameter.numel())), spread)
        self._sinks.append(sink)
        own = getattr(parameter, "weight_loader", None)
        load = own or default_weight_loader

        def weight_loader(*args: Any, **kwargs: Any) -> Any:
            try:
                result = load(*args, **kwargs)
            except Exception as error:
                raise LedgerError(self._unfit(sink, _loaded(args, kwargs), error)) from error
            self._note(path, sink, args, kwargs, taken=result is not False)
            return result

        parameter.weight_loader = weight_loader  # type: ignore[attr-defined]

        def restore() -> None:
            if own is None:
                del parameter.weight_loader  # type: ignore[attr-defined]
            else:
                parameter.weight_loader = own  # type: ignore[attr-defined]

        self._restores.append(restore)

    def _note(self, path: str, sink: _Sink, args: tuple[Any, ...], kwargs: dict[str, Any], *, taken: bool) -> None:
        loaded = _loaded(args, kwargs)
        source = self._source(loaded)
        if not taken:
            self._elsewhere.add(source)  # an expert of another rank
            return
        rest = [*args[2:], *(kwargs[key] for key in sorted(kwargs) if key not in _NO_PART)]
        part = tuple(value for value in rest if isinstance(value, (int, str)) and not isinstance(value, bool))
        # (param, weight, name, shard, expert), and not (param, weight, shard)
        if len(args) > 2 and isinstance(args[2], str) and len(rest) > 1:
            part = tuple(value for value in part if value != args[2])
        if part in sink.loads:
            which = f" (part {', '.join(map(str, part))})" if part else ""
            self._problems.append(f"{sink.name}{which} was loaded twice: from {sink.loads[part]} and {source}")
        sink.loads[part] = source
        sink.sizes[part] = loaded.numel() if isinstance(loaded, Tensor) else sink.numel
        self._used[source] = path

    def _source(self, loaded: object) -> str:
        """The name of what is being loaded."""
        return (self._sources.of(loaded) if isinstance(loaded, Tensor) else None) or self._current

    def _unfit(self, sink: _Sink, loaded: object, error: Exception) -> str:
        shape = f" {list(loaded.shape)}" if isinstance(loaded, Tensor) else ""
        reason = f": {error}" if str(error) else ""
        into = f"{sink.name} {list(sink.parameter.shape)}"
        return f"{self._source(loaded)}{shape} can't be loaded into {into}: {type(error).__name__}{reason}"

    def stream(self, weights: Iterable[tuple[str, Tensor]], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors on their way to the model's own loader; more may follow, until it is closed.

        ``prefix`` is what the known names begin with and these don't.
        """
        if not self.opened:
            self._open()
        for name, tensor in weights:
            self._current = name
            if _says_nothing(name, tensor) or (self._known and not self._known.isdisjoint({name, prefix + name})):
                self._idle.add(name)
            self._sources.add(name, tensor)
            self._seen[name] += 1
            yield name, tensor

    def _open(self) -> None:
        self.opened = True
        with torch.no_grad():
            for sink in self._sinks:
                if sink.name.endswith(_MAY_BE_LEFT):
                    sink.before = sink.parameter.data.clone()
                # A buffer's value is what it was made with, unless another is loaded.
                sink.blank = isinstance(sink.parameter, nn.Parameter) and make_blank(sink.parameter.data)

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors that came."""
        return frozenset(self._seen)

    def close(self, ranks: Ranks | None = None) -> str:
        """End the watch; the digest of all loads. Raises :class:`LedgerError` naming what isn't as it must be.

        ``ranks`` are asked whether each tensor of an expert that isn't here is on one of them, where experts are shared
        out over them.
        """
        self.remove()
        if ranks is not None:
            takers = Counter(name for names in ranks.tell("the ledger", set(self._used)) for name in names)
            lost = {name: takers[name] for name in sorted(self._elsewhere) if takers[name] != 1}
            self._problems += [f"{name} was taken by {count} ranks, not by one" for name, count in lost.items()]
        for sink in self._sinks:
            self._settle(sink)
        self._problems += [f"{name} is in the checkpoint twice" for name, times in self._seen.items() if times > 1]
        self._problems += [f"{name} was taken by no parameter" for name in self._untaken()]
        if self._problems:
            more = len(self._problems) - _LISTED
            what = "of the blocks to be swapped" if self._known is None else "that were pushed"
            listed = "; ".join(self._problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
            raise LedgerError(f"the weights {what} are not covered: {listed}")
        return self._digest()

    def remove(self) -> None:
        """Take the watch off; every parameter has its own loader again."""
        for restore in self._restores:
            restore()
        self._restores.clear()

    def _settle(self, sink: _Sink) -> None:
        """Hold what was written to a parameter against its size; what only fills up a kernel's tile becomes zero."""
        data = sink.parameter.data
        if self._known is not None and not sink.loads and (not sink.blank or bool(blank(data).all())):
            return
        self.written.append(sink.parameter)
        if not sink.loads and sink.before is not None:
            data.copy_(sink.before)
            return
        if not sink.blank:
            self._problems += [] if sink.loads or not data.numel() else [f"{sink.name}: never loaded"]
            return
        empty = blank(data)
        count = int(empty.sum())
        if sink.loads and (written := data.numel() - count) > sum(sink.sizes.values()) * sink.spread:
            size, source = min((size, sink.loads[part]) for part, size in sink.sizes.items())
            came = f"{sum(sink.sizes.values())} came, {size} of them as {source}"
            self._problems.append(f"{sink.name}: {written} elements were written where {came}")
        if not count:
            return
        missing = count - (data.numel() - sink.numel)
        if missing > 0:
            where = ""
            if data.ndim == 3:
                experts = empty.flatten(1).sum(1)
                short = (experts > (data.numel() - sink.numel) // len(data)).nonzero().flatten().tolist()
                where = f", in expert {', '.join(map(str, short[:_LISTED]))}" + (", …" if len(short) > _LISTED else "")
            what = "never loaded" if not sink.loads else f"{missing} of {sink.numel} elements missing or NaN{where}"
            self._problems.append(f"{sink.name}: {what}")
        zero(data, empty)

    def _untaken(self) -> list[str]:
        """Tensors that lie in the checkpoint where a block's others lie, and reached none of its parameters."""
        if self._known is not None:
            return [name for name in self._seen if name not in self._used.keys() | self._idle | self._elsewhere]
        taken: dict[str, list[str]] = {}
        for name, path in self._used.items():
            taken.setdefault(path, []).append(name)
        folders = tuple(folder for names in taken.values() if (folder := _folder(names)))
        known = self._used.keys() | self._idle | self._elsewhere
        return [name for name in self._seen if name not in known and name.startswith(folders)]

    def _digest(self) -> str:
        lines = sorted(f"{sink.name} {part} {source}" for sink in self._sinks for part, source in sink.loads.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


_MAY_BE_LEFT = ".w13_bias", ".w2_bias", "_weight_shape", ".weight_shape", ".g_idx"
"""Parameters that vLLM makes for quantised layers and that a checkpoint may do without, or nobody reads."""


def _says_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be taken by nobody: a bias of zeros, or an order of groups that is the plain one."""
    if name.endswith(".bias"):
        return not bool(tensor.any())
    if not name.endswith(".g_idx") or tensor.ndim != 1 or len(tensor) == 0:
        return False
    size = int((tensor == tensor[0]).sum())
    return bool((tensor == torch.arange(len(tensor), device=tensor.device) // size).all())


def _loaded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What a ``weight_loader`` was given to load."""
    return (dict(zip(("param", "loaded_weight"), args, strict=False)) | kwargs).get("loaded_weight")


def _finer(block: nn.Module, prefix: str) -> dict[str, int]:
    """By path the layers of a block that cut blocks of scales finer, and into how many: an element counts for each."""
    methods = ((path, getattr(module, "quant_method", None)) for path, module in block.named_modules(prefix=prefix))
    refined = ((path, getattr(method, "weight_scale_refine", None)) for path, method in methods)
    return {path: math.prod(times) for path, times in refined if times is not None}


_NO_PART = frozenset(["param", "loaded_weight", "weight_name", "return_success"])


class _Sources:
    """Whose memory a loaded tensor is: weights reach their parameters whole, in slices, or read ahead of others."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, list[tuple[int, int, str]]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage.data_ptr())
        if known is None or known[0].expired():
            known = self._known[storage.data_ptr()] = (StorageWeakRef(storage), [])
        begin = tensor.data_ptr()
        known[1].append((begin, begin + tensor.nbytes, name))

    def of(self, tensor: Tensor) -> str | None:
        """The name of the tensor that ``tensor`` is a part of; None if it is memory of its own."""
        ref, parts = self._known.get(tensor.untyped_storage().data_ptr(), (None, []))
        if ref is None or ref.expired():
            return None
        return next((name for begin, end, name in reversed(parts) if begin <= tensor.data_ptr() < end), None)


def _folder(names: list[str]) -> str:
    """What the names of a block's tensors begin with in the checkpoint, up to a dot; "" if that can't be told."""
    if len(names) < 2:
        return ""
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".") for name in names), strict=False))
    return "".join(f"{parts[0]}." for parts in common)
