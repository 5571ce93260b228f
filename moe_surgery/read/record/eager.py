"""Functions that code had compiled, run as they are written: compilers hide operations, and TorchScript branches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from types import CellType
from typing import Any

import torch
from torch import nn

from moe_surgery.read.record.length import spaces, spaces_of
from moe_surgery.read.record.reach import as_written, functions_of, holders


def eagerly() -> AbstractContextManager[object]:
    """While this lasts, functions that were given to ``torch.compile`` run uncompiled.

    Where they can't be compiled, the compiler remembers that, and a block that needs them whole wouldn't run any more
    after its record. Importing the compiler takes seconds: where nothing was compiled it isn't there.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def unscripted(block: nn.Module) -> Iterator[None]:
    """While this lasts, TorchScript functions and operators that code of ``block`` names run as they are written.

    So does what its modules hold of them, and what code of the objects in it names, or finds around it.
    """
    objects = [holder for _, holder in holders(block) if not isinstance(holder, nn.Module)]
    held = [*spaces(block), *chain.from_iterable(map(spaces_of, objects)), *map(vars, block.modules())]
    placed = [
        (space, name, value, made_of)
        for space in {id(space): space for space in held}.values()
        for name, value in space.items()
        if (made_of := as_written(value)) is not None
    ]
    around = {id(cell): cell for function in functions_of(block) for cell in function.__closure__ or ()}
    found = [(cell, held) for cell in around.values() if (held := _held(cell)) is not None]
    cells = [(cell, held, made_of) for cell, held in found if (made_of := as_written(held)) is not None]
    for space, name, _, made_of in placed:
        space[name] = made_of
    for cell, _, made_of in cells:
        cell.cell_contents = made_of
    try:
        yield
    finally:
        for space, name, value, _ in placed:
            space[name] = value
        for cell, value, _ in cells:
            cell.cell_contents = value


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None
