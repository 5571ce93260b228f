"""Checks on a block that no record of its forward would show: before reading, of what it is; after, of what is left."""

from __future__ import annotations

import inspect
from collections import Counter

from torch import Tensor, nn

from moe_surgery.find.result import Unreadable
from moe_surgery.find.watch import scripted
from moe_surgery.spec import MoESpec
from moe_surgery.weights.layout import Layout, MLPPieces, Piece

_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_ROWS = 1 << 62


def check_site(block: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the block by name, after checks that no record of its forward would show.

    Raises :class:`~moe_surgery.find.result.Unreadable` for hooks, for other arguments than one tensor, for tied
    weights (stacking would part them), and for weights of several dtypes or devices.
    """
    if not any(True for _ in block.parameters()):
        raise Unreadable("it has no weights")
    if (script := scripted(block)) is not None:
        raise Unreadable(f"{script} is TorchScript, whose control flow can't be followed")
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        raise Unreadable("a global module hook is registered")
    for name, module in block.named_modules():
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            raise Unreadable(f"{name or 'the block'} has a hook")
    parameters = list(inspect.signature(block.forward).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(parameters) != 1 or len(plain) != 1:
        raise Unreadable(f"its forward takes ({', '.join(map(str, parameters))}), not one tensor")
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
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1:
        raise Unreadable(f"its weights have several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise Unreadable(f"its weights are {dtypes.pop()}, not floating point")
    if len({tensor.device for tensor in state.values()}) > 1:
        raise Unreadable("its weights are on several devices")
    return state


def check_complete(state: dict[str, Tensor], layout: Layout, spec: MoESpec) -> None:
    """Every element of every parameter and buffer must have exactly one role."""
    used: Counter[str] = Counter()
    pieces: list[tuple[Piece, int]] = [(layout.router, spec.router.num_experts * spec.hidden)]
    for mlp in layout.experts:
        pieces += _sized(mlp, spec.experts.width * spec.hidden)
    if layout.shared and spec.shared:
        pieces += _sized(layout.shared, spec.shared.width * spec.hidden)
    if layout.shared_gate:
        pieces.append((layout.shared_gate, spec.hidden))
    ends: dict[tuple[str, int | None], int] = {}
    for piece, size in sorted(pieces, key=lambda sized: sized[0].rows or (0, 0)):
        start, end = piece.rows or (0, _ALL_ROWS)
        if start < ends.get((piece.path, piece.index), 0):
            raise Unreadable(f"{piece} is used in two places")
        ends[piece.path, piece.index] = end
        used[piece.path] += size
    for name, tensor in state.items():
        if name not in used:
            raise Unreadable(f"{name} takes no part in what was read")
        if used[name] != tensor.numel():
            raise Unreadable(f"{used[name]} of {name}'s {tensor.numel()} elements take part in what was read")


def _sized(mlp: MLPPieces, size: int) -> list[tuple[Piece, int]]:
    return [(mlp.gate, size), (mlp.up, size), (mlp.down, size)]
