"""A record put together: what a block returned, and the operations that this came of."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor

from moe_surgery.calling import Constant, structured
from moe_surgery.read.reading import Unfollowed
from moe_surgery.read.record.choices import no_choice
from moe_surgery.read.record.flow import Choice, Flow, Given, Op, Ref
from moe_surgery.read.record.known_numbers import LOAD, Kind
from moe_surgery.read.record.tensor_entries import tensors_in

if TYPE_CHECKING:
    from moe_surgery.read.record.recorder import Recorder


def assembled(recorder: Recorder, answer: Any, shape: tuple[int, ...]) -> Flow:
    """The record of a call with an input of ``shape`` that came to ``answer``, as far as the results need it."""
    output = _output(recorder, answer, shape)
    entry = recorder.entry(output)
    if entry.node is None:
        raise recorder.object_to("its output doesn't depend on its input")
    results = structured(answer, lambda value, where: _result(recorder, value, where, output))
    positive = recorder.positive
    more = [leaf.value for leaf in results.leaves() if isinstance(leaf, Given)] if answer is not output else []
    needed, waiting = set(), [entry.node, *(choice.node for choice in recorder.made())]
    waiting += [node for node in [*more, *positive] if isinstance(node, torch.fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            if "objection" in node.meta:
                raise recorder.object_to(node.meta["objection"])
            needed.add(node)
            waiting += node.all_input_nodes
    kept = [node for node in recorder.graph.nodes if node in needed]
    index = {node: Ref(place) for place, node in enumerate(kept)}
    ops = tuple(_op(recorder, node, index) for node in kept)
    choices = tuple(Choice(index[choice.node], choice.k, choice.ids, choice.largest) for choice in recorder.made())
    found = Flow(
        ops,
        index[entry.node],
        choices,
        branches=tuple(recorder.branches.met),
        lone=recorder.branches.lone,
        positive=tuple(index[node] for node in positive),
        used=frozenset(recorder.entries.used),
    )
    if answer is output:
        return found

    def placed(leaf: Any) -> Any:
        known = isinstance(leaf, Given) and isinstance(leaf.value, torch.fx.Node)
        return replace(leaf, value=index[leaf.value]) if known else leaf

    return replace(found, results=results.mapped(placed))


def _output(recorder: Recorder, answer: Any, shape: tuple[int, ...]) -> Tensor:
    """The first of the returned tensors that is like the input."""
    found = tensors_in(answer)
    if not found:
        raise recorder.object_to(f"it returns a {type(answer).__name__}, not one tensor")
    for output in found:
        alike = output.shape[-1:] == shape[-1:] and output.numel() == torch.Size(shape).numel()
        fits = tuple(output.shape) == shape or (alike and (recorder.route is no_choice or answer is not output))
        if fits and output.dtype == recorder.dtype:
            return output
    first = found[0]
    reason = f"its output is {tuple(first.shape)} {first.dtype}, its input {shape} {recorder.dtype}"
    raise Unfollowed(reason, len(recorder.graph.nodes), answered=True)


def constant(recorder: Recorder, value: Tensor) -> Constant | None:
    """What a tensor is that doesn't depend on the input and is the same in all of its elements."""
    entry, shape = recorder.entry(value), tuple(value.shape)
    known = entry.real if entry.kind == Kind.PLAIN and value.numel() else None
    if known is None or not recorder.uniform(known) or not all(size in recorder.fixed for size in shape):
        return None
    dtypes = {str(value.dtype).removeprefix("torch."), *(["native"] if value.dtype == recorder.dtype else [])}
    return Constant(float(known.reshape(-1)[0]), shape, frozenset(dtypes))


def _result(recorder: Recorder, value: Any, where: str, output: Tensor) -> Any:
    """One leaf of what the block returns: its output, another tensor, or what is the same in every call."""
    if value is output:
        return Given(where, None, tuple(value.shape), "")
    if isinstance(value, Tensor):
        entry = recorder.entry(value)
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if (same := constant(recorder, value)) is not None:
            return same
        if entry.node is not None:
            return Given(where, entry.node, shape, dtype)
        if entry.kind == Kind.CHOSEN:
            return Given(where, entry.real, shape, dtype)
        raise recorder.object_to(f"it also returns ({where}) {LOAD}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise recorder.object_to(f"it also returns ({where}) a {type(value).__name__}")


def _op(recorder: Recorder, node: torch.fx.Node, index: dict[torch.fx.Node, Ref]) -> Op:
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    if node.op == "placeholder":
        return Op("input", (node.target,), {}, shape, dtype)
    if node.op == "get_attr":
        const = recorder.consts.get(str(node.target))
        if const is None:
            return Op("param", (str(node.target),), {}, shape, dtype)
        return Op("const", (const,), {}, shape, dtype)
    operands: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: index[arg])  # type: ignore[arg-type, return-value]
    name = "item" if node.target is operator.getitem else node.meta["name"]
    made = recorder.made()
    chosen = {"choice": made.index(node.meta["choice"])} if node.meta.get("choice") in made else {}
    return Op(name, tuple(operands[0]), {**operands[1], **chosen}, shape, dtype)
