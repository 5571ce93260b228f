"""Checks on a block that no record of its forward would show: before reading, of what it is; after, of what is left."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.arguments import arguments_of
from moe_surgery.read.record.reach import as_written, functions, reachable
from moe_surgery.weights.layout import Layout, Piece

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (torch.bool, torch.int32, torch.int64)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_site(block: nn.Module, inputs: int = 1) -> dict[str, Tensor]:
    """Every parameter and buffer of the block by name, after checks that no record of its forward would show.

    Raises :class:`~moe_surgery.read.reading.Unreadable` for a ``__call__`` of its own, for hooks, for fewer than
    ``inputs`` arguments without a default, or more if there are several, for tied weights (stacking would part them),
    for weights that are no floating-point numbers as they are (vectors of counts or a mask may be whole numbers, and
    a table of experts by token id), and for weights on several devices.
    """
    if not any(True for _ in block.parameters()):
        raise Unreadable("it has no weights")
    if not any(parameter.numel() for parameter in block.parameters()):
        raise Unreadable("its weights have no elements, as of a model with no experts")
    if type(block).__call__ is not nn.Module.__call__:
        raise Unreadable("its __call__ is its own, so that its output isn't what its forward computes")
    if (script := _scripted(block)) is not None:
        raise Unreadable(f"{script} is TorchScript, whose control flow can't be followed")
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        raise Unreadable("a global module hook is registered")
    if (mode := _get_current_dispatch_mode()) is not None:
        raise Unreadable(f"{type(mode).__name__} is active, under which operations do something else")
    for name, module in block.named_modules():
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            raise Unreadable(f"{name or 'the block'} has a hook")
    arguments_of(block, inputs, absent=inputs == 1)
    state: dict[str, Tensor] = {}
    owners: dict[object, str] = {}
    for source in (block.named_parameters(remove_duplicate=False), block.named_buffers(remove_duplicate=False)):
        for name, tensor in source:
            if type(tensor) not in _TENSORS:
                raise Unreadable(f"{name} is a tensor subclass ({type(tensor).__name__}), which may compute otherwise")
            storage = (tensor.untyped_storage()._cdata, tensor.storage_offset())
            if storage in owners and tensor.numel():
                raise Unreadable(f"{owners[storage]} and {name} are tied: one tensor under two names")
            owners[storage] = name
            state[name] = tensor
    for name, tensor in state.items():
        table = tensor.dtype in (torch.int32, torch.int64) and tensor.ndim == 2
        if tensor.dtype not in _DTYPES and not (table or (tensor.dtype in _NUMBERS and tensor.ndim < 2)):
            raise Unreadable(f"{name} is {tensor.dtype}, not floating point")
    if len({tensor.device for tensor in state.values()}) > 1:
        raise Unreadable("its weights are on several devices")
    return state


def check_dtypes(state: dict[str, Tensor], layout: Layout) -> bool:
    """Whether the router's matrix is float32 and the experts' aren't.

    Vectors, such as a correction bias kept in float32, are read at any precision. Raises
    :class:`~moe_surgery.read.reading.Unreadable` for experts or a shared expert of several dtypes.
    """
    found: dict[torch.dtype, str] = {}
    for mlp in (*layout.experts, *((layout.shared,) if layout.shared else ())):
        found |= {state[piece.path].dtype: piece.path for piece in (mlp.gate, mlp.up, mlp.down) if piece.path}
    if layout.shared_gate is not None:
        found |= {state[layout.shared_gate.path].dtype: layout.shared_gate.path}
    if len(found) > 1:
        held = ", ".join(f"{path} is {dtype}" for dtype, path in found.items())
        raise Unreadable(f"its experts have several dtypes: {held}")
    if not layout.router.path or state[layout.router.path].dtype in found:
        return False
    if state[layout.router.path].dtype != torch.float32:
        raise Unreadable(f"its router is {state[layout.router.path].dtype}, its experts are {next(iter(found))}")
    return True


def _scripted(block: nn.Module) -> str | None:
    """What of a block's code is TorchScript that can't run as it was written; its branches leave no trace."""
    for path, module in block.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return path or "the block"
        for function in functions(module.forward):
            for name, value in reachable(function):
                if isinstance(value, torch.jit.ScriptFunction) and as_written(value) is None:
                    return name
    return None


def check_complete(state: dict[str, Tensor], layout: Layout, spare: range = range(0)) -> None:
    """Every element of every parameter and buffer must have exactly one role.

    Matrices number ``spare`` of stacked ones may have none: those of experts that need no matrices.
    """
    used: dict[tuple[str, int | None, bool], range | set[int]] = {}
    totals: Counter[str] = Counter()
    for piece in layout.pieces():
        places, size = _places(piece, tuple(state[piece.path].shape))
        key = piece.path, piece.index, piece.cols is not None
        if (piece.path, piece.index, piece.cols is None) in used:
            raise Unreadable(f"{piece} is some columns of a weight of which others are used whole")
        if key not in used:  # most matrices are one piece, whose places needn't be listed
            used[key] = places
        else:
            known = set(used[key])
            if not known.isdisjoint(places):
                raise Unreadable(f"{piece} is used in two places")
            used[key] = known.union(places)
        totals[piece.path] += len(places) * size
    for name, tensor in state.items():
        if name not in totals:
            raise Unreadable(f"{name} takes no part in what was read")
        unused = len(spare[: max(tensor.shape[0] - spare.start, 0)]) if spare and tensor.ndim == 3 else 0
        if totals[name] != tensor.numel() - unused * tensor[0].numel():
            raise Unreadable(f"{totals[name]} of {name}'s {tensor.numel()} elements take part in what was read")


def _places(piece: Piece, shape: tuple[int, ...]) -> tuple[range, int]:
    """Which rows (or columns, or elements of a vector) of its parameter a piece is, and how many elements each has."""
    shape = shape[:2] if piece.index is None else shape[1:] if len(shape) < 4 else shape[-2:]
    if piece.cols is not None:
        if piece.rows is not None or piece.out is not None or piece.transposed:
            raise Unreadable(f"{piece} is a block of a weight")
        return range(*piece.cols[:2]), shape[0]
    if len(shape) == 1:
        places, size = range(shape[0]), 1
    elif piece.transposed and piece.rows is None:
        places, size = range(shape[1]), shape[0]
    else:
        places, size = range(shape[0]), shape[1]
        if piece.transposed and piece.out is not None:
            raise Unreadable(f"{piece} is a block of a weight")
    places = places[slice(*piece.rows)] if piece.rows is not None else places
    return places if piece.out is None else places[slice(*piece.out)], size
