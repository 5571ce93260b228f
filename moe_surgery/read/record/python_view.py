"""What Python sees of a record's tensors: sizes of the batch as marked integers, the recorded dtype, a real device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode

from moe_surgery.read.record.batch_shape import BatchShape
from moe_surgery.read.record.batch_size import MARKED, BatchNumber, BatchSize
from moe_surgery.read.record.exchanged import exchange
from moe_surgery.read.record.known_numbers import COMPARISONS, DIVISIONS, LOAD, Kind
from moe_surgery.read.record.length import Choices
from moe_surgery.read.record.lineage import Origin
from moe_surgery.read.record.over_one_place import as_linear
from moe_surgery.read.record.ranked_along import RANKINGS, along_the_last
from moe_surgery.read.record.tensor_entries import tensors

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook

_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_EXCHANGE = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_NBYTES = torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]
# Where a tensor lies: where the block would run, not where the record does.
_DEVICE = torch.Tensor.device.__get__
_ON = {getattr(torch.Tensor, f"is_{kind}").__get__: kind for kind in ("cpu", "cuda", "meta", "mps", "xpu")}
_SIZES = frozenset(["size", "numel", "nelement"])
_LAYOUT = frozenset(["stride", "data_ptr", "untyped_storage", "storage", "storage_offset"])
_READS = frozenset(["item", "tolist", "numpy", "__array__", "__int__", "__float__", "__bool__", "__len__"])
# Functions that take sizes as sizes and places as places.
_SHAPERS = frozenset(
    "view reshape expand broadcast_to zeros ones empty full new_zeros new_ones new_empty new_full repeat tile "
    "unflatten split split_with_sizes narrow select __getitem__ __setitem__".split(" ")
)
_MAKERS = frozenset(["one_hot", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty"])
_VIEWS = frozenset(["view", "reshape"])
_SCALES = frozenset(["truediv", "itruediv", "div", "divide", "true_divide", "mul", "rmul", "imul", "multiply"])
_CALCULATES = "it calculates with the batch size"
_TENSORS = frozenset(["tensor", "as_tensor", "scalar_tensor"])
_NUMBERS = _TENSORS | {"arange"}


class Sizes(TorchFunctionMode):
    """Marks sizes that come from the batch, hides the record's own means, and objects to tensors from outside.

    With ``marks`` false sizes are plain integers: for records of another batch size, held against marked ones.
    """

    def __init__(self, notebook: Notebook, marks: bool) -> None:
        super().__init__()
        self.notebook, self.marks = notebook, marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        notebook, name = self.notebook, getattr(func, "__name__", "")
        if name == "new_tensor":  # its numbers have nothing to do with the tensor it is asked of
            kwargs = {"dtype": notebook.entry(args[0]).symbol().dtype, **kwargs}
            func, name, args = torch.tensor, "tensor", args[1:]
        if func == _DTYPE:
            return self._dtype(args[0])
        if name in ("type_as", "to") and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], self._dtype(args[1]), *args[2:])
            func, name = torch.Tensor.to, "to"
        if func == _DEVICE:
            return notebook.entries.device
        if func == _EXCHANGE and (weight := notebook.entries.owned(args[0])) is not None:
            return exchange(notebook, weight, *args)
        if func in _ON:
            return notebook.entries.device.type == _ON[func]
        operands = tensors((args, kwargs))
        if any(map(is_batchedtensor, operands)):
            raise notebook.object_to("it runs under torch.vmap")
        if not all(map(notebook.entries.knows, operands)):
            raise notebook.object_to("it uses a tensor that is neither its input nor one of its own weights")
        if isinstance(into := kwargs.get("out"), Tensor) and args:
            return self._written_to(into, func, args, kwargs)
        if (mapped := as_linear(name, args, kwargs, notebook.object_to)) is not None:
            return mapped
        ranks = name in RANKINGS and operands and notebook.symbolic(operands[0])
        if ranks and (ranked := along_the_last(name, args, kwargs, notebook.batch)) is not None:
            return ranked
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._places(args[1]), *args[2:])
        if not self.marks:
            return self._run(func, name, args, kwargs)
        if name in _READS and operands and not notebook.symbolic(args[0]):
            return self._read(func, name, args, kwargs)
        if operands and (name in _LAYOUT or func == _NBYTES or name == "__len__") and self._from_batch(args[0]):
            what = {"__len__": "len()", "__get__": "nbytes"}.get(name, name)
            raise notebook.object_to(f"it asks for {what} of a tensor, which depends on the batch size")
        if name == "is_contiguous" and (kwargs or len(args) > 1) and self._from_batch(args[0]):
            raise notebook.object_to("it asks whether a tensor is contiguous in a memory format")
        if name in ("__getitem__", "__setitem__"):
            self._check_cuts(args[0], args[1])
        if name.strip("_") in COMPARISONS and operands and not any(map(notebook.symbolic, operands)):
            args = tuple(notebook.limit(arg) if isinstance(arg, BatchSize) else arg for arg in args)
        sizes = [leaf for leaf in flat((args, kwargs)) if isinstance(leaf, MARKED)]
        if sizes and name not in _SHAPERS and any(map(notebook.symbolic, operands)):
            if name.strip("_") not in _SCALES or not all(size.pure and size.of_batch for size in sizes):
                raise notebook.object_to(_CALCULATES)
            notebook.scaled = _CALCULATES  # a mean, say, of which no output may come
        try:
            # What makes a tensor of them asks for floating-point numbers, to which sizes object.
            result = self._run(func, name, _numbers(args) if name in _TENSORS else args, kwargs)
        finally:
            notebook.scaled = None
        if name in _SIZES or func == _SHAPE:
            if isinstance(result, torch.Size):
                return BatchShape(self._sized(args[0], dim, size) for dim, size in enumerate(result))
            dim = kwargs.get("dim", *args[1:2]) if name == "size" else -1
            return self._sized(args[0], dim % max(args[0].ndim, 1), result) if name == "size" else self._mark(result)
        made = tensors(result) if sizes else []
        if name == "__setitem__" and sizes:
            if not any(map(notebook.symbolic, operands)):
                notebook.raise_kind(args[0], Kind.COUNT if all(size.pure for size in sizes) else Kind.DERIVED)
            return result
        if sizes and not made:
            raise notebook.object_to(f"it gives the batch size to {name}")
        for tensor in made:
            if not notebook.symbolic(tensor):
                self._made_of_sizes(name, args, kwargs, sizes, tensor)
        return result

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        """A tensor's dtype as the record has it; of a weight that was not used yet torch would say its own."""
        own, known = _DTYPE(tensor), self.notebook.entries.get(tensor)
        if not self.notebook.entries.owned(tensor):
            return own
        return self.notebook.entries.seen_dtype(own) if known is None else known.symbol().dtype

    def _written_to(self, out: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The result of a function, which is to be written to ``out``; torch would give that another shape."""
        result = func(*args, **{name: value for name, value in kwargs.items() if name != "out"})
        if not isinstance(result, Tensor) or _SHAPE(result) != _SHAPE(out) or result.dtype != out.dtype:
            raise self.notebook.object_to(f"{func.__name__} writes to a tensor of another form")
        return out.copy_(result)

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run it; one_hot's own checks of its argument's range are not the block's doing."""
        if name in _MAKERS or (self.marks and name in _VIEWS):  # sizes that the code gives as plain numbers
            plain = {size for size in flat((args, kwargs)) if type(size) is int}
            self.notebook.fixed.update(plain - self.notebook.batch)
            self.notebook.mistaken.update(plain & self.notebook.batch - {1})
        self.notebook.lenient = name == "one_hot" and len(args) + len(kwargs) > 1
        by = args[1] if name.strip("_") in DIVISIONS and len(args) > 1 else None
        self.notebook.by_batch = isinstance(by, BatchSize) and by.pure and by.of_batch
        try:
            return func(*args, **kwargs)
        finally:
            self.notebook.lenient = self.notebook.by_batch = False

    def _mark(self, size: int, always: bool = False) -> int:
        if size in self.notebook.fixed and not always:
            return size
        return BatchSize.of(size, self.notebook.object_to, branches=self.notebook.branches)

    def _sized(self, tensor: Tensor, dim: int, size: int) -> int:
        """A tensor's ``size`` along a dimension, with where it comes from if its numbers are known."""
        notebook = self.notebook
        if notebook.symbolic(tensor):
            return self._mark(size)
        # Of what was found the number is no other size, though it be one of them here.
        size = self._mark(size, always=dim == 0 and notebook.lineage.found(tensor))
        if isinstance(size, BatchSize):
            size.origin = notebook.lineage.sized(tensor, dim)
        return size

    def _from_batch(self, tensor: Tensor) -> bool:
        return any(size not in self.notebook.fixed for size in tensor.shape)

    def _check_cuts(self, tensor: Tensor, index: Any) -> None:
        """Note plain numbers beyond the end of the batch, which torch silently takes for the end."""
        items = list(index) if isinstance(index, tuple) else [index]
        taken = sum(_dims(item) for item in items)
        dim = 0
        for item in items:
            if isinstance(item, slice) and dim < tensor.ndim and tensor.shape[dim] not in self.notebook.fixed:
                for bound in (item.start, item.stop):
                    if type(bound) is int and abs(bound) > tensor.shape[dim]:
                        self.notebook.ledger.cut(bound, tensor.shape[dim])
            dim += tensor.ndim - taken if item is Ellipsis else _dims(item)

    def _places(self, index: Any) -> Any:
        """Lists of places as tensors; torch would make them where the record lies, without their numbers."""
        if isinstance(index, tuple):
            return tuple(map(self._places, index))
        if not isinstance(index, list) or not all(isinstance(place, int) for place in index):
            return index
        places = torch.tensor(index)
        self.notebook.raise_kind(places, Kind.COUNT)
        return places

    def _made_of_sizes(
        self, name: str, args: Any, kwargs: Any, sizes: Sequence[BatchSize | BatchNumber], result: Tensor
    ) -> None:
        kind = Kind.COUNT if all(size.pure for size in sizes) else Kind.DERIVED
        if name in ("full", "new_full"):
            fill = kwargs.get("fill_value", args[-1] if args else None)
            if not isinstance(fill, MARKED):
                return
        elif name in ("__getitem__", "narrow", "select", "split", "split_with_sizes"):  # a table cut to the batch
            if self.notebook.uniform(args[0]):
                return
        elif name in _SHAPERS:
            return
        elif name == "one_hot":
            kind = Kind.PLACED
        elif name in _TENSORS:
            listed = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.notebook.lineage.listed(result, [getattr(item, "origin", None) for item in listed])
        elif name not in _NUMBERS:
            kind = Kind.DERIVED
        self.notebook.raise_kind(result, kind)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Known numbers on their way to Python."""
        notebook, tensor = self.notebook, args[0]
        kind = notebook.kind(tensor)
        if kind == Kind.LOAD and name != "__len__":
            raise notebook.object_to(str(notebook.reason(tensor)))
        if name == "__len__":
            if tensor.shape and tensor.shape[0] not in notebook.fixed:
                raise notebook.object_to(f"it asks len() for {LOAD}")
        elif kind in (Kind.PLAIN, Kind.CHOSEN, Kind.PLACED) and self._from_batch(tensor):
            if kind == Kind.CHOSEN and name == "tolist" and tensor.ndim == 1:
                return Choices(tensor.tolist(), self._mark, notebook.object_to)
            raise notebook.object_to("it takes single tokens' numbers to Python, as many as the batch size")
        elif kind >= Kind.COUNT:
            # Numbers of tokens are whole, of whatever dtype they are.
            whole = tensor.dtype is not torch.bool and (kind == Kind.COUNT or not tensor.is_floating_point())
            if not whole or name in ("__int__", "__float__") or (name == "__bool__" and kind == Kind.DERIVED):
                raise notebook.object_to(f"it makes a plain number of {LOAD}")
            if name != "__bool__":
                numbers = self._numbers(tensor.tolist(), kind, notebook.lineage.of(tensor))
                return numbers if name in ("item", "tolist") else np.array(numbers, dtype=object)
        return func(*args, **kwargs)

    def _numbers(self, value: Any, kind: Kind, origin: Origin) -> Any:
        lineage = self.notebook.lineage
        if isinstance(value, list):
            return [self._numbers(item, kind, lineage.element(origin, place)) for place, item in enumerate(value)]
        size = BatchSize.of(value, self.notebook.object_to, LOAD, kind == Kind.COUNT)
        size.origin = origin
        return size


def _numbers(values: Any) -> Any:
    """Values with plain numbers instead of sizes."""
    if isinstance(values, (list, tuple)):
        return [_numbers(value) for value in values]
    if isinstance(values, BatchNumber):
        return float.__float__(values)
    return int.__index__(values) if isinstance(values, BatchSize) else values


def _dims(item: Any) -> int:
    """How many dimensions an index uses up."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def flat(value: Any) -> list[Any]:
    """Everything in nested lists, tuples, dicts and slices."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    elif isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in flat(item)]
