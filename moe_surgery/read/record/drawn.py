"""Random numbers that code draws and multiplies by zero, as routers do whose noise is for training.

Nothing comes of them but that they were drawn: the block's own operations go on drawing them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.fx

from moe_surgery.read.record.zeros import SHAPED

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook
    from moe_surgery.read.record.tensor_entries import Entry

_LIKE = frozenset(["randn_like", "rand_like"])
_DRAWN, _ZERO = "drawn", "zero"


def may_be_drawn(name: str, entries: dict[int, Entry]) -> bool:
    """Whether an operation draws numbers for a tensor that comes of the input, of which nothing may come then."""
    return name in _LIKE and any(entry.node is not None for entry in entries.values())


def check_used(notebook: Notebook, needed: set[torch.fx.Node]) -> None:
    """Object to random numbers of which nothing comes that is ``needed``: nobody would go on drawing them."""
    for node in notebook.graph.nodes:
        if node.meta.get("name") in _LIKE and node not in needed:
            raise notebook.object_to(f"it draws random numbers ({node.meta['name']}) that it doesn't use")


def check_drawn(notebook: Notebook, record: torch.fx.Node, args: Any, entries: dict[int, Entry]) -> None:
    """Object to what is made of random numbers, unless they are multiplied by zero."""
    name: str = record.meta["name"]
    if name in _LIKE:
        # Of tensors that lie otherwise in memory another number of them is drawn.
        given = notebook.entries.guarded
        if any(entry.storage in given or not entry.tensor.is_contiguous() for entry in entries.values()):
            raise notebook.object_to(f"it draws random numbers ({name}) for a tensor that lies as its input does")
        record.meta[_DRAWN] = name
        return
    nodes = [entry.node for entry in entries.values() if entry.node is not None]
    drawn = [node.meta[_DRAWN] for node in nodes if _DRAWN in node.meta]
    plain = [arg for arg in args if isinstance(arg, (bool, int, float))]
    if name == "mul" and (0 in plain or any(_ZERO in node.meta for node in nodes)):
        record.meta[_ZERO] = True
    elif drawn and (name in (*SHAPED, "_to_copy") or (name == "mul" and plain)):
        record.meta[_DRAWN] = drawn[0]
    elif drawn:
        raise notebook.object_to(f"it draws random numbers ({drawn[0]})")
