"""Recording a block: it is run once under the :class:`~.recorder.Recorder`, and must leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_surgery.read.reading import Broken, Unfollowed, Unreadable
from moe_surgery.read.record.flow import Flow, Route
from moe_surgery.read.record.outside_state import changes, watched
from moe_surgery.read.record.python_view import Sizes
from moe_surgery.read.record.recorder import Recorder, no_choice


def record(block: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, route: Route, *, plain: bool = False) -> Flow:
    """Run ``block`` once on a meta tensor of ``shape`` and ``dtype`` and write down what it does.

    Weights are read as if they had ``dtype``; their data is never touched, and they may be on any device. Sizes of the
    batch must differ from all other sizes in the block. A ``plain`` record takes any batch, but notices nothing that
    depends on its size; it is made with strided leading dimensions and with gradients enabled, to be held against one
    made without. Raises :class:`Unreadable` for anything that a record can't hold, also if the block's own code caught
    the first exception, and :class:`Unfollowed` if the block raises an error of its own.
    """
    recorder = Recorder(block, dtype, route)
    return _recorded(recorder, block, shape, plain, lambda hidden_states: (hidden_states,))


def record_experts(
    module: nn.Module, width: int, ids: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype, *, plain: bool = False
) -> Flow:
    """As :func:`record`, of a module of experts alone: called with tokens [T, width], ``ids`` [T, k] and weights."""
    recorder = Recorder(module, dtype, no_choice)

    def inputs(hidden_states: Tensor) -> tuple[Tensor, ...]:
        return hidden_states, *recorder.given(ids, weights_dtype)

    return _recorded(recorder, module, (len(ids), width), plain, inputs)


def _recorded(
    recorder: Recorder,
    block: nn.Module,
    shape: tuple[int, ...],
    plain: bool,
    inputs: Callable[[Tensor], tuple[Tensor, ...]],
) -> Flow:
    before = watched(block)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(plain):
            arguments = inputs(recorder.input(shape, strided=plain))
            with Sizes(recorder, marks=not plain), recorder:
                output = block(*arguments)
        flow = recorder.flow(output, shape)
    except (Unfollowed, Broken):
        raise
    except Exception as error:
        if recorder.objections:
            raise Unreadable(recorder.objections[0]) from error
        raise Unfollowed(f"its forward could not be followed: {type(error).__name__}: {error}") from error
    if recorder.objections:
        raise Unreadable(recorder.objections[0])
    changed = changes(before, watched(block))
    if changed:
        raise Unreadable(f"it keeps state between calls ({', '.join(changed[:3])} changed)")
    return flow
