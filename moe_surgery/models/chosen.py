"""What code alone shows to be chosen: equal MLPs by an argument, as those of modalities are, and heads of attention."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def chosen_by(module: nn.Module, alike: Iterable[tuple[str, ...]]) -> str | None:
    """How an argument of ``module`` tells which of its children ``alike`` it calls: a sentence, if one does.

    It may be compared, or say which tokens each of them computes.
    """
    several = [names for names in alike if len(names) > 1]
    code = _forward(module) if several else None
    if code is None:
        return None
    own, *given = (arg.arg for arg in (*code.args.posonlyargs, *code.args.args, *code.args.kwonlyargs))
    arguments = set(given[1:])
    for names in several:
        for branch in (node for node in ast.walk(code) if isinstance(node, (ast.If, ast.IfExp))):
            asked = sorted(arguments & set(_compared(branch.test)))
            ways = [set(names).intersection(_children(part, own)) for part in (branch.body, branch.orelse)]
            if asked and ways[0] != ways[1] and len(set(names).intersection(_children(code, own))) > 1:
                return f"it has no top-k: {asked[0]}, an argument, says which of {', '.join(names)} computes"
        places = _written_by(names, module, code)
        told = list(dict.fromkeys(ast.unparse(place.slice) for place in places.values()))
        if len(told) > 1 and len({ast.unparse(place.value) for place in places.values()}) == 1:
            return f"it has no top-k: {' and '.join(told)} say which tokens each of {', '.join(places)} computes"
    return None


def _written_by(names: tuple[str, ...], module: nn.Module, forward: ast.FunctionDef) -> dict[str, ast.Subscript]:
    """By child, which places of a tensor its output is written to, in a forward or a method that this calls."""
    found: dict[str, ast.Subscript] = {}
    named = set(_children(forward, forward.args.args[0].arg)) if forward.args.args else set()
    called = [code for name in sorted(named) if (code := _code(getattr(type(module), name, None))) is not None]
    for code in (forward, *called):
        own = code.args.args[0].arg if code.args.args else ""
        for node in ast.walk(code):
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Subscript):
                by = set(names).intersection(_children(node.value, own))
                within = list(ast.walk(target.slice))
                cut = any(isinstance(part, ast.Slice) and (part.lower or part.upper) for part in within)
                if len(by) == 1 and not cut and any(isinstance(part, ast.Name) for part in within):
                    found.setdefault(by.pop(), target)
    return found


def chooses_heads(module: nn.Module) -> str | None:
    """Which small layer of ``module`` scores heads of attention, of which the best are taken: a sentence, if one does.

    Beside it are layers of as many heads each, for queries, keys and values, or one for all of them, and one behind.
    """
    layers = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if len(layers) < 3:
        return None
    hidden = max(layer.in_features for layer in layers.values())
    wide = [layer for layer in layers.values() if layer.out_features >= hidden]
    one_for_all = any(layer.out_features == 3 * hidden for layer in wide)
    if len(wide) < (2 if one_for_all else 4):
        return None
    for name, layer in layers.items():
        heads = layer.out_features
        scores = 1 < heads < hidden == layer.in_features and not any(each.out_features % heads for each in wide)
        if scores and _takes_best(module):
            return f"what it takes the best of, scored by {name}, are heads of attention, which mix tokens"
    return None


def _takes_best(module: nn.Module) -> bool:
    code = _forward(module)
    return code is not None and any(isinstance(node, ast.Attribute) and node.attr == "topk" for node in ast.walk(code))


def _forward(module: nn.Module) -> ast.FunctionDef | None:
    return _code(type(module).forward)


def _code(function: Any) -> ast.FunctionDef | None:
    try:
        [code] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return code if isinstance(code, ast.FunctionDef) else None


def _compared(test: ast.expr) -> Iterator[str]:
    """The names that a test asks of, but those that it asks whether they are None."""
    none = {
        id(node.left)
        for node in ast.walk(test)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot))
    }
    yield from (node.id for node in ast.walk(test) if isinstance(node, ast.Name) and id(node) not in none)


def _children(part: ast.AST | list[ast.stmt], own: str) -> Iterator[str]:
    """The attributes that code names of the module, which it calls by its ``own`` name."""
    for inside in part if isinstance(part, list) else [part]:
        for node in ast.walk(inside):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own:
                yield node.attr
