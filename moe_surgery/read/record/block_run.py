"""Recording a block: it is run once under the :class:`~.recorder.Recorder`, and must leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_surgery.answers import Structure, borne_by, structured
from moe_surgery.calling import PLAIN, Calling
from moe_surgery.interrupts import without_interrupts
from moe_surgery.read.reading import Broken, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import Untouched, was_touched
from moe_surgery.read.record.assembly import assembled, constant
from moe_surgery.read.record.attributes import PLAIN_VALUES, Attributes, kept
from moe_surgery.read.record.choices import no_choice
from moe_surgery.read.record.eager import eagerly, unscripted
from moe_surgery.read.record.flow import Flow, Route
from moe_surgery.read.record.inputs import beside_input, block_input, experts_inputs
from moe_surgery.read.record.length import marked_lengths
from moe_surgery.read.record.notebook import Notebook
from moe_surgery.read.record.python_view import Sizes
from moe_surgery.read.record.recorder import Recorder
from moe_surgery.read.record.state import Watch
from moe_surgery.read.record.unknown_attributes import attributes_unknown


class Stateful(Unreadable):
    """A block keeps state between calls: ``written`` are attributes, with what it left there, ``flow`` the record."""

    def __init__(self, reason: str, written: Attributes | None = None, flow: Flow | None = None) -> None:
        super().__init__(reason)
        self.written, self.flow = written or {}, flow


def record(
    watch: Watch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    route: Route,
    *,
    plain: bool = False,
    calling: Calling = PLAIN,
    more: Mapping[str, Any] | None = None,
    turned: frozenset[str] = frozenset(),
    inside: bool = False,
) -> Flow:
    """Run a watched block once on a meta tensor of ``shape`` and ``dtype`` and write down what it does.

    Weights are read as if they had ``dtype``; their data is never touched, and they may be on any device. Sizes of the
    batch must differ from all other sizes in the block. A ``plain`` record takes any batch, but notices nothing that
    depends on its size; it is made with strided leading dimensions and with gradients enabled, to be held against one
    made without. Of ``turned`` comparisons of the batch size the other branch is recorded. ``inside``: of scores that
    are masked, some are chosen that aren't. Raises :class:`Unreadable`
    for anything that a record can't hold, also if the block's own code caught the first exception, and
    :class:`Unfollowed` if the block raises an error of its own.
    """

    def inputs(notebook: Notebook, hidden_states: Tensor) -> dict[str, Any]:
        beside = {c.key: beside_input(notebook, c, shape) for c in calling.companions}
        if calling.form is not None:
            notebook.batch |= set(calling.form.sides(shape[-2]))
        return {"hidden_states": hidden_states, **beside, **(more or {})}

    notebook = partial(Notebook, watch.block, dtype, route, turned, inside)
    return _recorded(partial(_once, notebook, watch, shape, plain, calling, inputs))


def record_experts(
    watch: Watch,
    calling: Calling,
    width: int,
    ids: Tensor,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    *,
    plain: bool = False,
) -> Flow:
    """As :func:`record`, of a module of experts alone: called with tokens [T, width], ``ids`` [T, k] and weights."""

    def inputs(notebook: Notebook, hidden_states: Tensor) -> dict[str, Any]:
        numbers, weights = experts_inputs(notebook, ids, weights_dtype)
        return {"hidden_states": hidden_states, "ids": numbers, "weights": weights}

    notebook = partial(Notebook, watch.block, dtype, no_choice)
    return _recorded(partial(_once, notebook, watch, (len(ids), width), plain, calling, inputs))


def record_slots(
    watch: Watch, calling: Calling, shape: tuple[int, ...], dtype: torch.dtype, *, plain: bool = False
) -> Flow:
    """As :func:`record`, of a module of experts alone that is called with slots of each, of that ``shape``."""

    def inputs(notebook: Notebook, hidden_states: Tensor) -> dict[str, Any]:
        assert calling.slots is not None
        notebook.batch -= {calling.slots.experts}  # which is no size of a batch
        return {"hidden_states": hidden_states}

    notebook = partial(Notebook, watch.block, dtype, no_choice)
    return _recorded(partial(_once, notebook, watch, shape, plain, calling, inputs))


def _as_tokens(calling: Calling, answer: Any, shape: tuple[int, ...]) -> Any:
    """What a block answered, the first tensor that lies as its input, of tokens of that ``shape``, brought back."""
    if calling.form is None:
        return answer
    sizes, found = calling.form.sizes(shape), list[Tensor]()

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or found or value.ndim != len(sizes) or tuple(value.shape) != sizes:
            return value
        found.append(value)
        return calling.tokens(value)

    answers = structured(answer, lambda value, _: leaf(value))
    if not found:
        raise Unfollowed(f"its output doesn't lie as its input, {calling.form}", -1)
    return answers.made(lambda value: value) if isinstance(answers, Structure) else answers


_Inputs = Callable[[Notebook, Tensor], dict[str, Any]]
"""The tensors that a block is called with, by role, of its input [..., H]."""
_Once = Callable[..., Flow]
"""What :func:`_once` gives of a block and a call, of ``own_int`` and the attributes that it is given."""


def _recorded(once: _Once) -> Flow:
    """A record that :func:`_once` gives.

    Where code gives ``int`` as a dtype, it is recorded with Python's own.
    """
    try:
        return _stateless(once, own_int=False)
    except Unfollowed as error:
        if not isinstance(error.__cause__, TypeError):
            raise
    return _stateless(once, own_int=True)


def _stateless(once: _Once, own_int: bool) -> Flow:
    """A record that :func:`_once` gives.

    Where code reads attributes that it wrote, it is recorded again with values there that object to being looked at: if
    the same comes of that, nothing depends on what a call before left there. Which object a value is can be asked
    without looking at it, so plain values are left there once more too, as the call left them.
    """
    try:
        return once(own_int)
    except Stateful as error:
        ways: list[Attributes] = [{place: Untouched() for place in error.written}]
        left = {place: value for place, value in error.written.items() if type(value) in PLAIN_VALUES}
        ways += [{place: left.get(place, Untouched()) for place in error.written}] if left else []
        with suppress(Unreadable):
            flows = [once(own_int, way) for way in ways]
            if error.flow is not None and all(flow.like(error.flow) for flow in flows):
                return flows[0]
        raise


@without_interrupts(once=True)  # a mode that is left on the stack would see all that the program does later
def _once(
    make: Callable[[], Notebook],
    watch: Watch,
    shape: tuple[int, ...],
    plain: bool,
    calling: Calling,
    inputs: _Inputs,
    own_int: bool,
    given: Attributes | None = None,
) -> Flow:
    """One run of a watched block, with the attributes that it is ``given``, and a notebook of its own."""
    notebook = make()
    block, written = watch.block, watch.before()
    written.give(given or {})
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(plain), eagerly(), unscripted(block):
            tensors = inputs(notebook, block_input(notebook, shape, strided=plain))
            with marked_lengths(block, own_int), Recorder(notebook):
                arguments = calling.placed(tensors)
                with attributes_unknown(notebook, tensors.values()), Sizes(notebook, marks=not plain):
                    output = block(*arguments)
                if borne := [name for value in tensors.values() if type(value) is Tensor for name in borne_by(value)]:
                    raise notebook.object_to(f"it puts attributes on its input ({', '.join(borne)})")
                output = _as_tokens(calling, output, shape)
        changed = written.changed()
        first = given or {}
        if any(type(value) is Untouched and was_touched(value) for value in first.values()):
            first = {}
        form = calling.form.sizes(shape) if calling.form is not None else ()
        same = kept(block, changed, partial(constant, notebook), shape, frozenset(first), form)
        flow = assembled(notebook, output, shape, same)
    except (Unfollowed, Broken):
        raise
    except Exception as error:
        if notebook.objections:
            raise notebook.unreadable() from error
        reason = f"its forward could not be followed: {type(error).__name__}: {error}"
        raise Unfollowed(reason, len(notebook.graph.nodes)) from error
    finally:
        names = watch.after()
    if notebook.objections or notebook.reservations:
        raise notebook.unreadable()
    known = {f"{path}.{name}".lstrip(".") for path, name in same}
    state = [name for name in names if not any(name == one or name.startswith(f"{one}.") for one in known)]
    if state:
        reason = f"it keeps state between calls ({', '.join(state[:3])} changed)"
        others = {place: value for place, value in changed.items() if place not in same}
        raise Stateful(reason, others, None if given else flow)
    return flow
