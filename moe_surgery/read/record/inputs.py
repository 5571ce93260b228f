"""What a block is called with in a record: tensors with a shape, a dtype and no data, which it may not write to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_surgery.companion import Companion
from moe_surgery.read.record.choices import Made
from moe_surgery.read.record.known_numbers import Kind

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook


def block_input(notebook: Notebook, shape: tuple[int, ...], *, strided: bool) -> Tensor:
    """The block's input; ``strided`` in its leading dimensions in a record without marks."""
    tensor = torch.empty(shape, dtype=notebook.dtype, device="meta")
    if strided:
        tensor = torch.empty((*shape[-2::-1], shape[-1]), dtype=notebook.dtype, device="meta")
        tensor = tensor.permute(*range(len(shape) - 2, -1, -1), len(shape) - 1)
    notebook.ledger.plain = strided
    notebook.tokens = torch.Size(shape[:-1]).numel()
    notebook.batch = {*shape[:-1], notebook.tokens}
    entry = notebook.enter(tensor, notebook.graph.placeholder("hidden_states"), tensor)
    notebook.entries.guarded[entry.storage] = "its input"
    return tensor


def beside_input(notebook: Notebook, companion: Companion, shape: tuple[int, ...]) -> Tensor:
    """A tensor beside the block's input, which has that ``shape``."""
    dtype = notebook.dtype if companion.dtype is None else companion.dtype
    tensor = torch.empty(companion.shape(shape), dtype=dtype, device="meta")
    node = notebook.graph.placeholder(companion.key)
    node.meta["beside"] = True
    entry = notebook.enter(tensor, node, tensor)
    notebook.entries.guarded[entry.storage] = f"its {companion.name}"
    notebook.fixed.update(companion.over if isinstance(companion.over, tuple) else ())
    return tensor


def experts_inputs(notebook: Notebook, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ids [T, k] and weights [T, k] that a module of experts alone is called with; ids count as chosen."""
    weights = torch.empty(ids.shape, dtype=dtype, device="meta")
    entry = notebook.enter(weights, notebook.graph.placeholder("weights"), weights)
    notebook.entries.guarded[entry.storage] = "its weights"
    real = ids.clone()
    entry = notebook.entries.enter(real, None, None, real, Kind.CHOSEN)
    notebook.entries.guarded[entry.storage] = "its ids"
    notebook.fixed.add(ids.shape[-1])
    node = notebook.entry(weights).node
    assert node is not None
    notebook.choices.add(Made(node, node, ids.shape[-1], ids, True), entry.storage)
    return real, weights
