"""Where known numbers come from: the operations that made them, back to the ids that a top-k was told to choose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_surgery.read.record.choices import Made
from moe_surgery.read.record.tensor_entries import mapped

_OF_FOUND = frozenset(["select", "slice", "unbind", "squeeze", "alias", "detach", "_to_copy"])

_PUT_BACK: dict[Any, Any] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}


@dataclass(frozen=True, eq=False)
class Chosen:
    """The indices that a choice was told to return."""

    choice: Made
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plain:
    """Numbers that the code brought along, or that it ``counted`` in Python: numbers of tokens."""

    value: Tensor
    counted: bool = False


@dataclass(frozen=True, eq=False)
class Computed:
    """The result of an operation, item ``place`` of it if it has several; tensors among the operands are origins."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None


@dataclass(frozen=True, eq=False)
class Asked:
    """What ``func`` told of the record's own tensor ``node``: where it isn't zero. ``value`` is that in the record."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: Any
    value: Tensor


Origin = Chosen | Plain | Computed | Asked


class Lineage:
    """The origins of the known tensors of one record, by identity; whoever records keeps the tensors alive."""

    def __init__(self) -> None:
        self._known: dict[int, Origin] = {}

    def of(self, tensor: Tensor) -> Origin:
        found = self._known.get(id(tensor))
        return Plain(tensor) if found is None else found

    def chose(self, tensor: Tensor, choice: Made) -> None:
        self._known[id(tensor)] = Chosen(choice, tuple(tensor.shape))

    def counted(self, tensor: Tensor) -> None:
        self._known[id(tensor)] = Plain(tensor, counted=True)

    def sized(self, tensor: Tensor, dim: int) -> Origin:
        """Where the size of a known tensor along one of its dimensions comes from."""
        return Computed(torch.ops.aten.sym_size.int, (self.of(tensor), dim), {}, None)

    def element(self, origin: Origin, place: int) -> Origin:
        """Where an element of known numbers, or a row of them, comes from."""
        return Computed(torch.ops.aten.select.int, (origin, 0, place), {}, None)

    def number(self, origin: Any, dtype: torch.dtype) -> Origin:
        """Where a tensor without dimensions comes from that was made of a number in Python."""
        kwargs = {"dtype": dtype, "device": torch.device("cpu")}
        if isinstance(origin, Computed) and origin.func is torch.ops.aten.sym_size.int:
            return Computed(torch.ops.aten.full.default, ([], origin), kwargs, None)
        return Computed(torch.ops.aten._to_copy.default, (origin,), kwargs, None)

    def found(self, tensor: Tensor) -> bool:
        """Whether a known tensor's first dimension is as long as something was found often in another."""
        origin = self.of(tensor)
        while isinstance(origin, Computed) and origin.func._schema.name.split("::")[1] in _OF_FOUND:
            origin = origin.args[0]
        return isinstance(origin, Computed) and origin.func is torch.ops.aten.nonzero.default

    def listed(self, tensor: Tensor, origins: Sequence[Origin | None]) -> None:
        """Take down that a vector was made of numbers in Python, of which each comes from one of ``origins``."""
        if tensor.ndim != 1 or len(origins) != len(tensor) or None in origins:
            self.counted(tensor)
            return
        parts = [self.number(origin, tensor.dtype) for origin in origins]
        self._known[id(tensor)] = Computed(torch.ops.aten.stack.default, (parts,), {}, None)

    def full(self, tensor: Tensor, value: float) -> None:
        kwargs = {"dtype": tensor.dtype, "device": tensor.device}
        self._known[id(tensor)] = Computed(torch.ops.aten.full.default, (list(tensor.shape), value), kwargs, None)

    def asked(self, tensor: Tensor, func: Any, args: Any, kwargs: Any, node: Any) -> None:
        self._known[id(tensor)] = Asked(func, tuple(args), dict(kwargs), node, tensor.clone())

    def origins(self, operands: Any) -> Any:
        """``operands`` with their origins for tensors, as they are before an operation writes to any."""
        return mapped(self.of, operands)

    def placed(self, mask: Tensor, places: Sequence[Tensor]) -> None:
        """Take down that ``places``, one tensor for each dimension, are those where a known mask holds."""
        found = Computed(torch.ops.aten.nonzero.default, (self.of(mask),), {}, None)
        for dim, each in enumerate(places):
            self._known[id(each)] = Computed(torch.ops.aten.select.int, (found, 1, dim), {}, None)

    def made(self, func: Any, operands: Any, result: Any) -> None:
        args, kwargs = operands
        several = isinstance(result, (list, tuple))
        for place, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                origin = Computed(func, tuple(args), kwargs, place if several else None)
                self._known[id(tensor)] = origin
                if func._schema.is_mutable and not several:
                    self._written(args[0], origin)

    def _written(self, before: Origin, after: Origin) -> None:
        """Take down that what was a part of another tensor, made as ``before`` says, now is as ``after`` says there."""
        if isinstance(before, Computed) and before.func in _PUT_BACK:
            whole = before.args[0]
            changed = Computed(_PUT_BACK[before.func], (whole, after, *before.args[1:]), before.kwargs, None)
            self._known.update({key: changed for key, origin in self._known.items() if origin is whole})
            self._written(whole, changed)


def done(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation on known numbers, which are calculated on the CPU wherever the block is.

    There torch counts no whole numbers in a histogram, as it does on a GPU.
    """
    whole = func is torch.ops.aten.histc.default and not args[0].is_floating_point()
    return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype) if whole else func(*args, **kwargs)


def chosen(origins: Iterable[Origin]) -> set[Made]:
    """The choices that numbers come from."""
    return {origin.choice for origin in sources(origins) if isinstance(origin, Chosen)}


def calculated(origins: Iterable[Origin]) -> Iterator[Computed]:
    """The calculations that numbers come from, the last of all first."""
    return (origin for origin in _behind(origins) if isinstance(origin, Computed))


def sources(origins: Iterable[Origin]) -> list[Chosen | Asked]:
    """The choices, and questions to computed tensors, that numbers come from."""
    return [origin for origin in _behind(origins) if isinstance(origin, (Chosen, Asked))]


def form(origin: Any) -> tuple[Any, ...]:
    """What of a number's origin is the same in records of other batches: which operations it came of, in order."""
    if not isinstance(origin, Computed):
        return (type(origin).__name__,)
    operands = [*origin.args, *origin.kwargs.values()]
    listed = [item for operand in operands for item in (operand if isinstance(operand, (list, tuple)) else (operand,))]
    return str(origin.func), *(form(item) for item in listed if isinstance(item, Origin))


def _behind(origins: Iterable[Origin]) -> Iterator[Origin]:
    """``origins`` and all that they were calculated from, each once, the last of all first."""
    seen: set[int] = set()
    waiting: list[Any] = list(origins)
    while waiting:
        later: list[Any] = []
        for item in waiting:
            if isinstance(item, Origin) and id(item) not in seen:
                seen.add(id(item))
                yield item
                if isinstance(item, Computed):
                    later += [*item.args, *item.kwargs.values()]
            elif isinstance(item, dict):
                later += item.values()
            elif isinstance(item, (list, tuple)):
                later += item
        waiting = later
