"""``len`` of a tensor as a size that is marked: Python's own gives a plain number, whatever it is asked of."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from moe_surgery.read.record.outside_state import functions


@contextmanager
def marked_lengths(block: nn.Module) -> Iterator[None]:
    """While this lasts, code of ``block`` and what it calls by name finds a ``len`` that keeps marks.

    Code that it finds otherwise gets Python's own, to which a size of the batch is an objection.
    """
    spaces = {id(space): space for space in _spaces(block) if "len" not in space}
    for space in spaces.values():
        space["len"] = _length
    try:
        yield
    finally:
        for space in spaces.values():
            space.pop("len", None)


def _length(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)


def _spaces(block: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of all code that a block's modules define, or that their forwards call by name."""
    for module in block.modules():
        for cls in type(module).__mro__:
            if cls is nn.Module:
                break
            for value in vars(cls).values():
                if isinstance(value, FunctionType) and value.__module__.split(".")[0] != "torch":
                    yield value.__globals__
        for function in functions(module.forward):
            yield function.__globals__
