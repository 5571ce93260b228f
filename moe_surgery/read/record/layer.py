"""Recording the layer around a block: which of its children it calls, with what, and what becomes of their answers.

Every child stands for itself here, whatever it computes: the layer's own forward runs on placeholders, and a call of a
child gives another placeholder. Code that looks at one, such as a branch on its shape or values, can't be followed.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn

from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.state import changes, watched

_MOST_OPTIONAL = 6
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_HANDS_ON = ("DICT_MERGE", "LIST_EXTEND", "CALL_FUNCTION_EX")
"""What follows in a function's code where ``*args`` or ``**kwargs`` are given to another, in Python 3.10 to 3.13."""


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

    Arguments that it has no names for are not given; it may only hand them on.
    Raises :class:`~moe_surgery.read.reading.Unreadable` if it can't be followed.
    """
    if "forward" in vars(layer):
        raise Unreadable("it has a forward of its own")
    parameters = inspect.signature(layer.forward).parameters.values()
    _check_unnamed(layer, [parameter.name for parameter in parameters if parameter.kind in _SEVERAL])
    named = [parameter for parameter in parameters if parameter.kind not in _SEVERAL]
    optional = [parameter.name for parameter in named if _may_be_none(parameter)]
    if len(optional) > _MOST_OPTIONAL:
        raise Unreadable(f"{len(optional)} of its arguments may be None")
    found = 0
    for given in itertools.product((True, False), repeat=len(optional)):
        calls = _calls(layer, named, {name for name, there in zip(optional, given, strict=True) if not there})
        if calls is not None:
            found += 1
            yield calls
    if not found:
        raise Unreadable("its forward raises an error whatever it is called with")


def _check_unnamed(layer: nn.Module, names: list[str]) -> None:
    """Raise :class:`Unreadable` if the forward does more with arguments it has no names for than to hand them on."""
    code = inspect.unwrap(type(layer).forward).__code__
    steps = list(dis.get_instructions(code))
    for name in names:
        uses = [after.opname for step, after in itertools.pairwise(steps) if step.argval == name]
        if name in code.co_cellvars or any(use not in _HANDS_ON for use in uses):
            raise Unreadable(f"it looks at its arguments *{name}")


def _may_be_none(parameter: inspect.Parameter) -> bool:
    told = str(parameter.annotation)
    return parameter.annotation is parameter.empty or parameter.default is None or "None" in told or "Optional" in told


class _Tracer(torch.fx.Tracer):
    def __init__(self, named: list[inspect.Parameter], left_out: set[str]) -> None:
        super().__init__()
        self._named, self._left_out = named, left_out

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        positional, keyword = [], {}
        for parameter in self._named:
            value = None
            if parameter.name not in self._left_out:
                value = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[parameter.name] = value
            else:
                positional.append(value)
        return functools.partial(root_fn, **keyword), [self.root, *positional]


def _calls(layer: nn.Module, named: list[inspect.Parameter], left_out: set[str]) -> Calls | None:
    """The calls where the arguments ``left_out`` are None; None if the forward doesn't take that."""
    before = watched(layer)
    try:
        graph = _Tracer(named, left_out).trace(layer)
    except Exception as error:
        if left_out and isinstance(error, (AttributeError, TypeError)) and "NoneType" in str(error):
            return None
        told = str(error).partition(". ")[0]
        raise Unreadable(f"its forward can't be followed: {type(error).__name__}: {told}") from error
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
