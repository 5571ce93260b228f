"""Attributes that somebody may put on the tensors that a block is given: a record knows of none of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook

_turn = threading.Lock()
_watching: dict[int, Callable[[str], None]] = {}  # by tensor, in records of all threads


@contextmanager
def attributes_unknown(notebook: Notebook, inputs: Iterable[Any]) -> Iterator[None]:
    """While this lasts, code that looks for attributes of ``inputs`` that tensors haven't by themselves is objected to.

    Somebody may put some on the tensors that the block is given later.
    """
    watched = [tensor for tensor in inputs if issubclass(type(tensor), Tensor)]

    def note(what: str) -> None:
        notebook.object_to(f"it looks for {what} of its input, which somebody may put there")

    for tensor in watched:
        tensor.__dict__ = _Watched(partial(note, "the attributes"))
    with _turn:
        _watching.update({id(tensor): note for tensor in watched})
        torch.Tensor.__getattr__ = _missing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _turn:
            for tensor in watched:
                del _watching[id(tensor)]
            if not _watching and "__getattr__" in vars(torch.Tensor):
                del torch.Tensor.__getattr__  # type: ignore[attr-defined]
        for tensor in watched:
            tensor.__dict__ = dict(dict.items(tensor.__dict__))


def _missing(tensor: Tensor, name: str) -> Any:
    note = _watching.get(id(tensor))
    by = sys._getframe(1).f_globals["__name__"].partition(".")[0]
    if note is not None and by != "torch" and not name.startswith("__"):
        note(f"an attribute ({name})")
    raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")


def _telling(name: str) -> Any:
    def method(self: _Watched, *given: Any, **named: Any) -> Any:
        self.looked_at()
        return getattr(dict, name)(self, *given, **named)

    return method


class _Watched(dict[str, Any]):
    """A tensor's attributes; ``looked_at`` is called where code asks for any of them, but not by its name."""

    def __init__(self, looked_at: Callable[[], None]) -> None:
        super().__init__()
        self.looked_at = looked_at


for _name in (
    "get keys values items copy pop setdefault __getitem__ __contains__ __iter__ __len__ __eq__ __or__ __ror__"
).split():
    setattr(_Watched, _name, _telling(_name))
