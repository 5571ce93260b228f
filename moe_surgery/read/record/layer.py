"""Recording the layer around a block: which of its children it calls, with what, and what becomes of their answers.

Every child stands for itself here, whatever it computes: the layer's own forward runs on placeholders, and a call of a
child gives another placeholder. Code that looks at one, such as a branch on its shape or values, can't be followed.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn

from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.outside_state import changes, watched

_MOST_OPTIONAL = 5


@dataclass(frozen=True)
class Call:
    """One step of a layer's forward: ``what`` it is, and the places of the earlier steps that it takes.

    ``child`` is the path of the child that is called, and ``what`` is "" then. ``alone`` says that it takes nothing but
    those.
    """

    what: str
    child: str
    operands: tuple[int, ...]
    alone: bool


Calls = tuple[Call, ...]


def record_layer(layer: nn.Module) -> Iterator[Calls]:
    """What the forward of ``layer`` does: for each choice of the arguments that may be None, in order.

    Raises :class:`~moe_surgery.read.reading.Unreadable` if it can't be followed.
    """
    if "forward" in vars(layer):
        raise Unreadable("it has a forward of its own")
    optional = [name for name, parameter in _parameters(layer) if _may_be_none(parameter)]
    if len(optional) > _MOST_OPTIONAL:
        raise Unreadable(f"{len(optional)} of its arguments may be None")
    found = 0
    for left_out in itertools.product((False, True), repeat=len(optional)):
        calls = _calls(layer, [name for name, out in zip(optional, left_out, strict=True) if out])
        if calls is not None:
            found += 1
            yield calls
    if not found:
        raise Unreadable("its forward raises an error whatever it is called with")


def _parameters(layer: nn.Module) -> list[tuple[str, inspect.Parameter]]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        (name, parameter)
        for name, parameter in inspect.signature(layer.forward).parameters.items()
        if parameter.kind not in several
    ]


def _may_be_none(parameter: inspect.Parameter) -> bool:
    told = str(parameter.annotation)
    return parameter.annotation is parameter.empty or parameter.default is None or "None" in told or "Optional" in told


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _calls(layer: nn.Module, left_out: list[str]) -> Calls | None:
    """The calls where the arguments ``left_out`` are None; None if the forward doesn't take that."""
    before = watched(layer)
    try:
        graph = _Tracer().trace(layer, dict.fromkeys(left_out))
    except Exception as error:
        if left_out and isinstance(error, (AttributeError, TypeError)) and "NoneType" in str(error):
            return None
        raise Unreadable(f"its forward can't be followed: {type(error).__name__}: {error}") from error
    finally:
        changed = changes(before, watched(layer))
    if changed:
        raise Unreadable(f"it keeps state between calls ({', '.join(changed[:3])} changed)")
    places = {node: place for place, node in enumerate(graph.nodes)}
    return tuple(_call(node, places) for node in graph.nodes)


def _call(node: torch.fx.Node, places: dict[torch.fx.Node, int]) -> Call:
    given: list[Any] = [*node.args, *node.kwargs.values()]
    alone = all(isinstance(value, torch.fx.Node) for value in given)
    taken = given if alone else node.all_input_nodes
    operands = tuple(places[value] for value in taken)
    if node.op == "call_module":
        return Call("", str(node.target), operands, alone)
    if node.target in (operator.add, operator.iadd):
        return Call("add", "", operands, alone)
    return Call(str(node.target) if node.op == "call_method" else node.op, "", operands, alone)
