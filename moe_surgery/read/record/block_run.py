"""Recording a block: it is run once under the :class:`~.recorder.Recorder`, and must leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.calling import PLAIN, Calling
from moe_surgery.read.reading import Broken, Unfollowed, Unreadable
from moe_surgery.read.record.assembly import assembled, constant
from moe_surgery.read.record.attributes import Written, kept
from moe_surgery.read.record.choices import no_choice
from moe_surgery.read.record.flow import Flow, Route
from moe_surgery.read.record.length import marked_lengths
from moe_surgery.read.record.outside_state import changes, watched
from moe_surgery.read.record.python_view import Sizes
from moe_surgery.read.record.recorder import Recorder


def record(
    block: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    route: Route,
    *,
    plain: bool = False,
    calling: Calling = PLAIN,
    more: Mapping[str, Any] | None = None,
    turned: frozenset[str] = frozenset(),
) -> Flow:
    """Run ``block`` once on a meta tensor of ``shape`` and ``dtype`` and write down what it does.

    Weights are read as if they had ``dtype``; their data is never touched, and they may be on any device. Sizes of the
    batch must differ from all other sizes in the block. A ``plain`` record takes any batch, but notices nothing that
    depends on its size; it is made with strided leading dimensions and with gradients enabled, to be held against one
    made without. Of ``turned`` comparisons of the batch size the other branch is recorded. Raises :class:`Unreadable`
    for anything that a record can't hold, also if the block's own code caught the first exception, and
    :class:`Unfollowed` if the block raises an error of its own.
    """
    recorder = Recorder(block, dtype, route, turned)
    return _recorded(recorder, block, shape, plain, lambda x: calling.placed({"hidden_states": x, **(more or {})}))


def record_experts(
    module: nn.Module,
    calling: Calling,
    width: int,
    ids: Tensor,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    *,
    plain: bool = False,
) -> Flow:
    """As :func:`record`, of a module of experts alone: called with tokens [T, width], ``ids`` [T, k] and weights."""
    recorder = Recorder(module, dtype, no_choice)

    def inputs(hidden_states: Tensor) -> tuple[Any, ...]:
        numbers, weights = recorder.given(ids, weights_dtype)
        return calling.placed({"hidden_states": hidden_states, "ids": numbers, "weights": weights})

    return _recorded(recorder, module, (len(ids), width), plain, inputs)


def _recorded(
    recorder: Recorder,
    block: nn.Module,
    shape: tuple[int, ...],
    plain: bool,
    inputs: Callable[[Tensor], tuple[Any, ...]],
) -> Flow:
    before, written = watched(block), Written(block)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(plain):
            arguments = inputs(recorder.input(shape, strided=plain))
            with marked_lengths(block), Sizes(recorder, marks=not plain), recorder:
                output = block(*arguments)
        same = kept(block, written.changed(), partial(constant, recorder))
        flow = assembled(recorder, output, shape, same)
    except (Unfollowed, Broken):
        raise
    except Exception as error:
        if recorder.objections:
            raise Unreadable(recorder.objections[0]) from error
        reason = f"its forward could not be followed: {type(error).__name__}: {error}"
        raise Unfollowed(reason, len(recorder.graph.nodes)) from error
    finally:
        after = watched(block)
        written.undo()
    if recorder.objections:
        raise Unreadable(recorder.objections[0])
    changed = changes(before, after)
    state = [name for name in changed if name not in {f"{path}.{name}".lstrip(".") for path, name in same}]
    if state:
        raise Unreadable(f"it keeps state between calls ({', '.join(state[:3])} changed)")
    return flow
