"""Writes to a tensor through views of it, as operations that write to nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from moe_surgery.read.record.tensor_entries import Entry

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook


def bring_up_to_date(notebook: Notebook, entry: Entry, writer: Entry) -> None:
    """Write to a tensor what was written to its storage through ``writer``, as far as the two share elements."""
    if not writer.tensor.numel() or not entry.tensor.numel():
        return
    width = math.gcd(*(tensor.shape[-1] if tensor.ndim else 1 for tensor in (entry.tensor, writer.tensor)))
    mine, theirs = entry.starts(width), writer.starts(width)
    if mine is None or theirs is None:
        raise notebook.object_to("it writes to a tensor through a view of it, and then reads the tensor")
    place = {start: number for number, start in enumerate(mine.tolist())}
    shared = [(number, place[start]) for number, start in enumerate(theirs.tolist()) if start in place]
    if not shared:
        return
    source, target = (torch.tensor(places) for places in zip(*shared, strict=True))
    aten, shape = torch.ops.aten, list(entry.tensor.shape)
    new = _call(notebook, aten.reshape.default, writer.node, [len(theirs), width])
    if len(shared) == len(mine):
        new = _call(notebook, aten.index.Tensor, new, [notebook.known(source[target.argsort()])])
    else:
        old = _call(notebook, aten.reshape.default, notebook.node(entry), [len(mine), width])
        new = _call(notebook, aten.index.Tensor, new, [notebook.known(source)])
        new = _call(notebook, aten.index_put.default, old, [notebook.known(target)], new)
    node = _call(notebook, aten.reshape.default, new, shape)
    entry.node, entry.meta, entry.real = node, entry.symbol(), None


def _call(notebook: Notebook, func: Any, *args: Any) -> torch.fx.Node:
    """A functional operation that the block's code didn't ask for."""
    node = notebook.graph.call_function(func, args)
    node.meta["name"] = func._schema.name.split("::")[1]
    shapes = torch.fx.node.map_arg(args, lambda arg: torch.empty_like(arg.meta["val"], device="meta"))
    with notebook.unrecorded():
        node.meta["val"] = func(*shapes)
    return node
