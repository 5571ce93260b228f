"""A record put together: what a block returned, and the operations that this came of."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor

from moe_surgery.answers import Alone, Always, Constant, Structure, borne_by, leaves_of, mapped_leaves, structured
from moe_surgery.read.reading import Unfollowed
from moe_surgery.read.record.attributes import Attributes, size_of
from moe_surgery.read.record.batch_size import MARKED, BatchSize
from moe_surgery.read.record.choices import Made, no_choice
from moe_surgery.read.record.drawn import check_used
from moe_surgery.read.record.flow import Choice, Flow, Given, Op, Ref
from moe_surgery.read.record.known_numbers import Kind
from moe_surgery.read.record.lineage import Asked, chosen, sources
from moe_surgery.read.record.tensor_entries import tensors_in

if TYPE_CHECKING:
    from moe_surgery.read.record.notebook import Notebook


def assembled(notebook: Notebook, answer: Any, shape: tuple[int, ...], kept: Attributes) -> Flow:
    """The record of a call with an input of ``shape`` that came to ``answer``, as far as its results need it.

    ``kept`` are the attributes that it wrote; tensors among them are results too.
    """
    output = _output(notebook, answer, shape)
    entry = notebook.entry(output)
    if entry.node is None:
        raise notebook.object_to("its output doesn't depend on its input")
    results = structured(answer, lambda value, where: _result(notebook, value, where, output, shape))
    if answer is output and tuple(output.shape) != shape and notebook.route is not no_choice:
        results = Structure(Alone, (results,))
    positive = [node for node, _ in notebook.positive]
    attributes = {key: _attribute(notebook, value, key[1], shape) for key, value in kept.items()}
    several = isinstance(results, Structure)
    leaves = [*(results.leaves() if several else ()), *leaves_of(attributes.values())]
    made = _choices(notebook, [entry.node, *positive], [leaf for leaf in leaves if isinstance(leaf, Given)])
    needed = _before([entry.node, *(choice.node for choice in made), *positive])
    if objections := [node.meta["objection"] for node in needed if "objection" in node.meta]:
        raise notebook.object_to(objections[0])
    needed |= _before([leaf.value for leaf in leaves if _recorded(leaf)])
    needed |= _before([choice.record for choice in notebook.choices.made()])
    asked = _asked_for(needed, leaves)
    needed |= _before([question.node for question in asked])
    state = _state(notebook, needed)
    attributes |= {("", name): leaf for name, leaf in state.items()}
    needed |= _before([leaf.value for leaf in state.values()])
    asked = _asked_for(needed, [*leaves, *state.values()])
    needed |= _before([question.node for question in asked])
    check_used(notebook, needed)
    nodes = [node for node in notebook.graph.nodes if node in needed]
    index = {node: Ref(place) for place, node in enumerate(nodes)}
    ops = tuple(_op(notebook, node, index, made) for node in nodes)
    choices = tuple(Choice(index[choice.node], choice.k, choice.ids, choice.largest, choice) for choice in made)
    found = Flow(
        ops,
        index[entry.node],
        choices,
        branches=tuple(notebook.branches.met),
        lone=notebook.branches.lone,
        one_by_one=notebook.one_by_one,
        positive=tuple((index[node], places) for node, places in notebook.positive),
        asked={question: index[question.node] for question in asked},
        used=frozenset(op.args[0] for op in ops if op.name == "param"),
        kept={},
        outside=notebook.outside,
        within=frozenset(notebook.ledger.within),
        beyond=frozenset(notebook.ledger.beyond),
    )

    def placed(leaf: Any) -> Any:
        return replace(leaf, value=index[leaf.value]) if _recorded(leaf) else leaf

    found = replace(found, kept={key: mapped_leaves(leaf, placed) for key, leaf in attributes.items()})
    return replace(found, results=results.mapped(placed)) if several else found


def _recorded(leaf: Any) -> bool:
    return isinstance(leaf, Given) and isinstance(leaf.value, torch.fx.Node)


def _before(ends: list[torch.fx.Node]) -> set[torch.fx.Node]:
    """The operations that ``ends`` came of, and these."""
    found: set[torch.fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _attribute(notebook: Notebook, value: Any, name: str, shape: tuple[int, ...]) -> Any:
    """An attribute that the block wrote, as :func:`_result` puts it."""

    def leaf(value: Any, where: str) -> Any:
        found = _result(notebook, value, where, None, shape)
        return Always(found) if isinstance(found, Constant) else found

    if type(value) in (dict, list, tuple) or borne_by(value):
        return structured(value, leaf, name)
    return _result(notebook, value, name, None, shape) if isinstance(value, Tensor) else value


def _state(notebook: Notebook, needed: set[torch.fx.Node]) -> dict[str, Given]:
    """What the buffers that a call changed were changed to, by name.

    Nothing ``needed`` for anything else may know them: then the block does the same in every call.
    """
    found = {}
    for name in notebook.changed:
        entry = notebook.entry(notebook.entries.vectors[name])
        known = any(node.op == "get_attr" and node.target == name for node in needed)
        if entry.node is None or entry.node.op == "get_attr" or known:
            more = ", of which something else comes too" if known else ""
            raise notebook.object_to(f"it writes to {name}{more}")
        dtype = str(entry.tensor.dtype).removeprefix("torch.")
        found[name] = Given(name, entry.node, tuple(entry.tensor.shape), dtype, state=True)
    return found


def _output(notebook: Notebook, answer: Any, shape: tuple[int, ...]) -> Tensor:
    """The first of the returned tensors that is like the input."""
    found = tensors_in(answer)
    if not found:
        raise notebook.object_to(f"it returns a {type(answer).__name__}, not one tensor")
    for output in found:
        alike = output.shape[-1:] == shape[-1:] and output.numel() == torch.Size(shape).numel()
        others = notebook.route is no_choice or output.ndim == 2
        fits = tuple(output.shape) == shape or (alike and others)
        if fits and output.dtype == notebook.dtype:
            return output
    first = found[0]
    reason = f"its output is {tuple(first.shape)} {first.dtype}, its input {shape} {notebook.dtype}"
    if first.shape[:-1] == torch.Size(shape[:-1]) and first.dtype == notebook.dtype:
        reason = f"its output is of another width than its input: {first.shape[-1]}, not {shape[-1]}"
    raise Unfollowed(reason, len(notebook.graph.nodes), answered=True)


def constant(notebook: Notebook, value: Tensor) -> Constant | None:
    """What a tensor is that doesn't depend on the input and is the same in all of its elements."""
    entry, shape = notebook.entry(value), tuple(value.shape)
    known = entry.real if entry.kind == Kind.PLAIN and value.numel() else None
    if known is None or not notebook.uniform(known) or not all(size in notebook.fixed for size in shape):
        return None
    dtypes = {str(value.dtype).removeprefix("torch."), *(["native"] if value.dtype == notebook.dtype else [])}
    return Constant(float(known.reshape(-1)[0]), shape, frozenset(dtypes))


def _result(notebook: Notebook, value: Any, where: str, output: Tensor | None, shape: tuple[int, ...]) -> Any:
    """One leaf of what the block returns: its output, another tensor, a size of its input, or what is always so."""
    if isinstance(value, Tensor):
        if value is output:
            return Given(where, None, tuple(value.shape), "")
        entry = notebook.entry(value)
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if (same := constant(notebook, value)) is not None:
            return same
        if entry.node is not None:
            return Given(where, entry.node, shape, dtype)
        assert entry.real is not None
        return Given(where, entry.real, shape, dtype, notebook.lineage.of(value))
    if (size := size_of(value, shape)) is not None:
        return size
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, BatchSize) and value.origin is not None:
        held = torch.tensor(int.__index__(value))
        origin = notebook.lineage.number(value.origin, held.dtype)
        return Given(where, held, (), "int64", origin, number=True)
    what = "number of tokens in Python" if isinstance(value, MARKED) else type(value).__name__
    raise notebook.object_to(f"it also {'keeps' if output is None else 'returns'} ({where}) a {what}")


def _choices(notebook: Notebook, output: list[torch.fx.Node], leaves: list[Given]) -> list[Made]:
    """The choices that were made, but for those that only other results than the output came of."""
    if len(notebook.choices.made()) < 2 or not leaves:
        return notebook.choices.made()
    beside = _chosen_for(_before([leaf.value for leaf in leaves if _recorded(leaf)]))
    beside |= chosen(leaf.origin for leaf in leaves if leaf.origin is not None)
    beside -= _chosen_for(_before(output))
    return [choice for choice in notebook.choices.made() if choice not in beside] or notebook.choices.made()


def _chosen_for(nodes: set[torch.fx.Node]) -> set[Made]:
    """The choices whose values or ids are among some operations."""
    found = {node.meta["choice"] for node in nodes if node.meta.get("choice") is not None}
    return found | chosen(node.meta["origin"] for node in nodes if node.meta.get("origin") is not None)


def _asked_for(nodes: set[torch.fx.Node], leaves: list[Any]) -> list[Asked]:
    """The questions to computed tensors that known numbers among operations and results come from."""
    origins = [node.meta["origin"] for node in nodes if node.meta.get("origin") is not None]
    origins += [leaf.origin for leaf in leaves if isinstance(leaf, Given) and leaf.origin is not None]
    return [source for source in sources(origins) if isinstance(source, Asked)]


def _op(notebook: Notebook, node: torch.fx.Node, index: dict[torch.fx.Node, Ref], made: list[Made]) -> Op:
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    if node.op == "placeholder":
        name = "beside" if node.meta.get("beside") else "input"
        return Op(name, (node.target,), {}, shape, dtype)
    if node.op == "get_attr":
        const = notebook.consts.get(str(node.target))
        if const is None:
            return Op("param", (str(node.target),), {}, shape, dtype)
        return Op("const", (const,), {}, shape, dtype, origin=node.meta.get("origin"))
    operands: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: index[arg])  # type: ignore[arg-type, return-value]
    name = "item" if node.target is operator.getitem else node.meta["name"]
    choice = node.meta.get("choice")
    chosen = {"choice": made.index(choice)} if choice in made else {}
    objection = node.meta.get("objection")
    kwargs = {**operands[1], **chosen}
    return Op(name, tuple(operands[0]), kwargs, shape, dtype, node.target, choice, objection=objection)
