"""The part of a block that its own operations go on computing: a router that no spec says, results, and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

import torch
from torch.utils._pytree import tree_leaves

from moe_surgery.answers import Replayed, leaves_of
from moe_surgery.read.asking import FEW, Asking, spread
from moe_surgery.read.companions import reaching_all
from moe_surgery.read.parsed import Record, attribute
from moe_surgery.read.program import Builder
from moe_surgery.read.reading import Mistaken, Unreadable
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.flow import Given, Ref
from moe_surgery.read.record.lineage import Computed
from moe_surgery.read.trial import Trial
from moe_surgery.read.two_programs import of_both
from moe_surgery.replay import ENTERING, ROUTING, Program
from moe_surgery.weights.layout import Layout


def own_part(
    ask: Asking,
    records: Iterable[Record],
    one: tuple[int, ...],
    other: tuple[int, ...],
    dtype: torch.dtype,
    numbers: tuple[int, ...],
) -> Program | None:
    """The program of a block in ``dtype``, as records of batches of two shapes give it; None if nothing needs one.

    ``numbers`` are those that its experts have in the spec.
    Raises :class:`~moe_surgery.read.reading.Unreadable` for what can't be run again.
    """
    if not any(record.cut or any(_named(record)) for record in records):
        return None
    found = _of_both(ask, one, other, dtype)
    flat = [(torch.Size(shape[:-1]).numel(), shape[-1]) for shape in (one, other)]
    alone = not found.flat and ask.calling.form is None and ask.takes(flat[0], dtype)
    of_tokens = None if not alone else _of_both(ask, flat[0], flat[1], dtype)
    if any(record.cut for record in records):
        _check(ask, found, of_tokens, one, dtype, next(record.inner for record in records))
    if any(record.lone for record in records):
        _check_ones(ask, found, [record for record in records if 1 in record.lead], dtype)
    found = replace(found, of_tokens=of_tokens)
    _check_cuts(found, {end for record in records for end, _ in record.beyond})
    return found if numbers == tuple(range(len(numbers))) else found.renumbered(numbers)


def _check_ones(ask: Asking, found: Program, ones: list[Record], dtype: torch.dtype) -> None:
    """Raise :class:`Unreadable` if a block that asks whether a token is alone makes something else of one, or of a row.

    What it neither returns nor keeps then is nothing else.
    """
    state = {**dict(ask.block.named_parameters()), **dict(ask.block.named_buffers())}
    for record in ones:
        shape = record.shape
        other = _program(ask, record, shape)
        names = [name for name, _ in other.outputs if name not in (*ROUTING, ENTERING)]
        trial = Trial(state, shape[-1], record.inner, dtype)
        if names and not trial.alike(found.only(*names), other.only(*names), shape):
            raise Unreadable(f"{DEPENDS} (asks whether it is one)")


def _check_cuts(program: Program, beyond: set[int]) -> None:
    """Raise :class:`Unreadable` if a program cuts the batch ``beyond`` the one that it was recorded of."""
    for part in (program, program.of_tokens):
        steps = part.steps if part is not None else ()
        if cut := beyond.intersection(leaf for step in steps for leaf in tree_leaves((step.args, step.kwargs))):
            raise Unreadable(
                f"{DEPENDS} (cuts the batch at {min(cut)}), and its own operations are to go on computing part of it"
            )


def _check(
    ask: Asking, found: Program, of_tokens: Program | None, shape: tuple[int, ...], dtype: torch.dtype, inner: int
) -> None:
    """Raise :class:`Unreadable` if a router, or what stands around experts, differs between tokens or batches.

    ``inner`` is the size of what the routed experts are given.
    """
    state = {**dict(ask.block.named_parameters()), **dict(ask.block.named_buffers())}
    trial = Trial(state, shape[-1], inner, dtype)
    routing = found.only(*ROUTING, ENTERING)
    if not trial.row_by_row(routing):
        raise Unreadable("its router, or what stands around its experts, looks at other tokens of the batch")
    flat = [(prod(FEW),), (1,)] if found.flat else [(1, 1), FEW]
    ways = [shape, *((*lead, shape[-1]) for lead in flat)]
    others = []
    for way in ways:  # of another form in memory, where the block takes that
        plain = ask.takes(way, dtype, plain=True)
        try:
            other = ask(way, dtype, spread, plain=plain)
        except Mistaken:
            way = tuple(5 * size if size in FEW else size for size in way)
            other = ask(way, dtype, spread, plain=plain)
        others.append((way, _program(ask, other, way).only(*ROUTING, ENTERING)))
    if of_tokens is not None:
        others.append(((prod(FEW), shape[-1]), of_tokens.only(*ROUTING, ENTERING)))
    if not all(trial.alike(routing, other, way) for way, other in others):
        raise Unreadable("its router, or what stands around its experts, treats batches of other forms differently")


def _of_both(ask: Asking, one: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype) -> Program:
    first, second = (_on_all_branches(ask, shape, dtype) for shape in (one, other))
    found = of_both(first, second, one, other)
    if found is None:
        raise Unreadable(f"{_told(first)} depends on the batch in a way that can't be followed")
    return found


def _on_all_branches(ask: Asking, shape: tuple[int, ...], dtype: torch.dtype) -> Program:
    """The program of a batch, which must be the same whatever the block finds where it compares the batch's size."""
    record, others = ask.on_all_branches(shape, dtype, spread)
    found = _program(ask, record, shape)
    for _, other in others:
        if other is None or other.says != record.says or _program(ask, other, shape) != found:
            raise Unreadable(f"{DEPENDS} (compares it), and its own operations are to go on computing part of it")
    return found


def _named(record: Record) -> Iterator[str]:
    """What of a record's results and attributes is to be computed again."""
    leaves = [*leaves_of([record.results]), *leaves_of(record.kept.values())]
    yield from (leaf.where for leaf in leaves if isinstance(leaf, Replayed))


def _program(ask: Asking, record: Record, shape: tuple[int, ...]) -> Program:
    flow, names = record.flow, set(_named(record))
    assert flow is not None
    if flow.lone and record.cut is not None:  # what one token does is compared as far as it is read
        raise Unreadable(f"{DEPENDS} (compares it), and its own operations are to go on computing part of it")
    router = record.first.router
    kept = [(key, leaf) for key, value in flow.kept.items() for leaf in leaves_of([value])]
    given = {
        **{leaf.where: leaf for leaf in (flow.results.leaves() if flow.results else ()) if isinstance(leaf, Given)},
        **{attribute(path, leaf.where): leaf for (path, _), leaf in kept if isinstance(leaf, Given)},
    }
    builder = Builder(flow, shape, ask.calling.form)
    wanted: dict[str, Ref | Given] = {}
    if record.cut is not None:
        made = [choice for number in record.cut.choices if (choice := flow.choices[number].made) is not None]
        weights = _ones(shape) if record.cut.weights is None else Ref(record.cut.weights)
        wanted = {"weights": weights, "ids": record.cut.computed or builder.ids(made, record.cut.count)}
        if record.cut.entering is not None:
            wanted[ENTERING] = Ref(record.cut.entering)
        if taken := set(wanted) & names:
            raise Unreadable(f"it returns something called {min(taken)}, beside a router that goes on as it was")
    wanted |= {name: given[name] for name in sorted(names)}
    cut = record.cut
    routed, turned = (cut.routed, cut.turned) if cut else (None, False)
    found = builder.program(wanted, router.num_experts, routed, flow.output, turned)
    return reaching_all(found, ask.calling.companions)


def _ones(shape: tuple[int, ...]) -> Given:
    """A weight of 1 for the expert of each token of an input of ``shape``."""
    tokens, how = prod(shape[:-1]), {"dtype": torch.float32, "device": torch.device("cpu")}
    made = Computed(torch.ops.aten.full.default, ([tokens, 1], 1.0), how, None)
    return Given("weights", torch.ones(tokens, 1), (tokens, 1), "float32", made)


def own_weights(program: Program | None, layout: Layout) -> frozenset[str]:
    """The weights that a program alone takes. Raises :class:`Unreadable` if it takes any of the experts' too."""
    if program is None:
        return frozenset()
    of_experts = {piece.path for mlp in layout.experts for piece in mlp.pieces()}
    of_experts |= {piece.path for piece in layout.shared.pieces()} if layout.shared else set()
    if taken := of_experts & set(program.weights):
        raise Unreadable(f"{_told(program)} comes of {min(taken)}, which is its experts'")
    return frozenset(program.weights) - layout.paths()


def _told(program: Program) -> str:
    names = [name for name, _ in program.outputs if name not in (*ROUTING, ENTERING)]
    return f"what it keeps or returns ({', '.join(names)})" if names else "what its experts don't compute"
