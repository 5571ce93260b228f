"""Weights of which code exchanges the data: a bias, say, that is made float32 when a block is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook

_CONVERTS = frozenset(["_to_copy", "detach", "alias"])


def exchange(notebook: Notebook, name: str, weight: Tensor, data: Tensor) -> None:
    """Take ``data`` for a ``weight`` from here on: what it is in another dtype than the record's.

    Where the record has the dtype of the block, the weight would be another one after the call.
    """
    notebook.paused = True  # a weight that is first met here is no operation of the block's
    try:
        entry, made = notebook.entry(weight), notebook.entry(data)
    finally:
        notebook.paused = False
    source = made.node
    while source is not None and source.meta.get("name") in _CONVERTS:
        source = source.args[0]
    as_it_is = notebook.dtype != notebook.entries.own or made.symbol().dtype == entry.symbol().dtype
    if source is None or source is not entry.node or not as_it_is:
        raise notebook.object_to(f"it exchanges the data of {name} when it is called")
    entry.node, entry.meta = made.node, made.meta
