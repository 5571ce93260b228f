"""What a block answers: the structure that its results stand in, and what each of them is.

A block that gives more than its output is replaced by one that gives the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from moe_surgery.spec import RouterSpec

_SIZES = {"tokens": "tokens", "batch": "rows", "sequence": "columns"}

Value = Literal["output", "logits", "scores", "weights", "dense weights", "ids"]


@dataclass(frozen=True)
class Result:
    """One tensor among a block's results, a function of its tokens.

    ``logits`` and ``scores`` [T, E], ``weights`` and ``ids`` [T, k] of the chosen experts, highest first, or ``dense
    weights`` [T, E], which are zero for all others. ``dtypes`` are those it may have ("native" is the input's);
    ``leads`` what stands before its last dimension: "flat" for T, "batch" for the dimensions of the input.
    ``weighting`` says how weights are made of scores.
    """

    value: Value
    dtypes: frozenset[str]
    leads: frozenset[str]
    weighting: RouterSpec | None = None

    @property
    def dtype(self) -> str:
        return "native" if "native" in self.dtypes else min(self.dtypes)

    @property
    def flat(self) -> bool:
        return "batch" not in self.leads

    def __str__(self) -> str:
        if self.value == "output":
            return "output"
        return self.value + ("" if self.dtype == "native" or self.value == "ids" else f" {self.dtype}")


@dataclass(frozen=True)
class Constant:
    """A tensor that is the same in every call: every element is ``value``."""

    value: float
    shape: tuple[int, ...]
    dtypes: frozenset[str]

    @property
    def dtype(self) -> str:
        return "native" if "native" in self.dtypes else min(self.dtypes)

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Replayed:
    """A tensor that the block's own operations go on computing; ``where`` is its place among the results.

    A ``number`` is that tensor's only element, in Python.
    """

    where: str
    number: bool = False

    def of(self, replayed: Mapping[str, Any]) -> Any:
        """What it is in a call of which so much was ``replayed``, by name."""
        found = replayed[self.where]
        return found.item() if self.number else found

    def __str__(self) -> str:
        return "its own"


@dataclass(frozen=True)
class Updated(Replayed):
    """A buffer that every call changes in place, to what the block's own operations make of it and of the input."""


@dataclass(frozen=True)
class ShapeOfInput:
    """An attribute that is the shape of the input of the last call, as it was ("batch"), or of its tokens ("flat").

    ``leads`` are those that fit: of tokens [T, H] both do. One that lay in a form of its own is "form". It is a
    ``plain`` tuple, or a :class:`torch.Size`.
    """

    leads: frozenset[str]
    plain: bool = False


@dataclass(frozen=True)
class SizeOfInput:
    """An attribute, or result, that is a size of the input of the last call, or a multiple of one, or a part.

    ``ways`` are those that fit: of its tokens, or its rows ("batch") or columns ("sequence"), and how many times that.
    ``value`` is the number itself where it was the same for every input: then it is nothing else. It is an ``int``
    unless it is ``broken``.
    """

    ways: frozenset[tuple[str, int | Fraction]]
    value: float | None = None
    broken: bool = False

    def of(self, shape: Sequence[int]) -> float:
        """The number for an input of ``shape`` [..., H]."""
        sizes = sizes_of(shape)
        name, times = min(self.ways)
        return float(sizes[name] * times) if self.broken else int(sizes[name] * times)

    def __str__(self) -> str:
        if self.value is not None:
            return str(self.value)
        name, times = min(self.ways)
        return f"its number of {_SIZES[name]}" + (f", times {times}" if times != 1 else "")


def sizes_of(shape: Sequence[int]) -> dict[str, int]:
    """The sizes of an input of ``shape`` [..., H], by name."""
    return {"tokens": math.prod(shape[:-1]), "batch": shape[0], "sequence": shape[-2]}


@dataclass(frozen=True)
class OfSeveral:
    """An attribute that a call with one token leaves as it is, and any other gives a ``value``."""

    value: Any


@dataclass(frozen=True)
class Always:
    """An attribute of an object, not of a module, that every call gives the same ``value``: plain, or a constant."""

    value: Any


class Alone:
    """The kind of structure that an output has that is returned as it is, its tokens in one dimension."""

    def __new__(cls, items: Sequence[Any]) -> Any:
        [item] = items
        return item


class Bearing:
    """The kind of structure that a tensor is which bears attributes; its own key is empty."""

    def __new__(cls, **parts: Any) -> Any:
        tensor = parts.pop("")
        vars(tensor).update(parts)
        return tensor


@dataclass(frozen=True)
class Structure:
    """Results in a tuple, list, dict or dataclass of ``kind``, or on a tensor; ``keys`` where they are named."""

    kind: type
    items: tuple[Any, ...]
    keys: tuple[str, ...] | None = None

    def leaves(self) -> Iterator[Any]:
        for item in self.items:
            yield from item.leaves() if isinstance(item, Structure) else (item,)

    def made(self, leaf: Callable[[Any], Any]) -> Any:
        """The structure anew, of ``leaf`` of every leaf."""
        items = [item.made(leaf) if isinstance(item, Structure) else leaf(item) for item in self.items]
        if self.keys is not None:
            return self.kind(**dict(zip(self.keys, items, strict=True)))
        return self.kind(*items) if hasattr(self.kind, "_fields") else self.kind(items)

    def mapped(self, leaf: Callable[[Any], Any]) -> Structure:
        """The same structure with other leaves."""
        items = tuple(item.mapped(leaf) if isinstance(item, Structure) else leaf(item) for item in self.items)
        return Structure(self.kind, items, self.keys)

    def __str__(self) -> str:
        texts = [str(item) for item in self.items]
        if self.kind is Alone:
            return f"{texts[0]} as tokens"
        if self.kind is Bearing:
            borne = [f"{key} {text}" for key, text in zip(self.keys or (), texts, strict=True)]
            return f"{texts[0]} with {', '.join(borne[1:])}"
        if self.keys is not None:
            return f"{self.kind.__name__}({', '.join(f'{k}={t}' for k, t in zip(self.keys, texts, strict=True))})"
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


Written = Replayed | ShapeOfInput | SizeOfInput | Always | OfSeveral | Structure
"""Attributes that a call writes anew; what is anything else is the same after every call."""


def leaves_of(values: Iterable[Any]) -> Iterator[Any]:
    """The leaves of structures among some values, and the others."""
    for value in values:
        yield from value.leaves() if isinstance(value, Structure) else (value,)


def mapped_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A structure with other leaves, or ``leaf`` of what is none."""
    return value.mapped(leaf) if isinstance(value, Structure) else leaf(value)


def structured(value: Any, leaf: Callable[[Any, str], Any], where: str = "") -> Any:
    """``value`` as a :class:`Structure` of ``leaf(item, name)``, or one leaf. Names are those of keys and places."""
    keys: tuple[str, ...] | None = None
    if borne := borne_by(value):
        own = leaf(value, where)
        parts = [structured(item, leaf, f"{where}.{name}".lstrip(".")) for name, item in borne.items()]
        return Structure(Bearing, (own, *parts), ("", *borne))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = tuple(f.name for f in dataclasses.fields(value))
        items = [getattr(value, key) for key in keys]
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        keys, items = tuple(value), list(value.values())
    elif isinstance(value, (tuple, list)):
        items = list(value)
    else:
        return leaf(value, where)
    names = keys or tuple(map(str, range(len(items))))
    parts = [structured(item, leaf, f"{where}.{name}".lstrip(".")) for name, item in zip(names, items, strict=True)]
    return Structure(type(value), tuple(parts), keys)


def borne_by(value: Any) -> dict[str, Any]:
    """The attributes that code put on a tensor; a parameter's say how it is trained, or loaded."""
    kind = type(value)
    return vars(value) if (kind.__module__, kind.__qualname__) == ("torch", "Tensor") else {}


def output_of(results: Structure | None, answer: Any) -> Any:
    """The output among the results of a call."""
    if results is None:
        return answer
    found: list[Any] = []

    def walk(shape: Any, value: Any) -> None:
        if isinstance(shape, Structure) and shape.kind in (Alone, Bearing):
            walk(shape.items[0], value)
        elif isinstance(shape, Structure):
            parts = [
                getattr(value, key, None) if not isinstance(value, dict) else value[key] for key in shape.keys or ()
            ]
            for item, part in zip(shape.items, parts if shape.keys is not None else value, strict=True):
                walk(item, part)
        elif isinstance(shape, Result) and shape.value == "output":
            found.append(value)

    walk(results, answer)
    return found[0]
