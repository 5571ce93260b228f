"""The record of a block's forward: operations in order, and every top-k on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_surgery.answers import Structure
from moe_surgery.read.record.choices import Made
from moe_surgery.read.record.lineage import Asked, Origin, chosen

Route = Callable[[int, int, int], Tensor]
"""``(rows, choices, k) -> ids`` int64 [rows, k]: which choices a top-k is to return."""


@dataclass(frozen=True)
class Ref:
    """An operand that is the result of operation ``index``."""

    index: int


@dataclass(frozen=True, eq=False)
class Op:
    """One recorded operation. ``name`` is "input", "beside", "param", "const", "item" or an aten name without
    underscores.

    An input's only operand is its name: "hidden_states", or "weights" where experts alone were recorded; so is that of
    a tensor beside it. A top-k has the number of its choice among the keyword operands.

    Operands that are results of other operations are :class:`Ref`; ``shape`` and ``dtype`` are the result's.
    ``func`` is the operation itself, and ``made`` the choice that it makes; ``origin`` says where numbers of a "const"
    come from, and ``objection`` why no output may come of it.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    func: Any = None
    made: Made | None = None
    origin: Origin | None = None
    objection: str | None = None

    @cached_property
    def operands(self) -> frozenset[int]:
        """The operations that it takes the results of."""
        return frozenset(_indices((self.args, self.kwargs)))


def _indices(operand: Any) -> Iterator[int]:
    if isinstance(operand, Ref):
        yield operand.index
    elif isinstance(operand, (list, tuple)):
        for item in operand:
            yield from _indices(item)
    elif isinstance(operand, dict):
        yield from _indices(tuple(operand.values()))


@dataclass(frozen=True, eq=False)
class Choice:
    """One top-k: which operation's result it ranks (``scores``), how many it takes, and the ids it was told to take.

    ``made`` tells it from others while it is recorded.
    """

    scores: Ref
    k: int
    ids: Tensor
    largest: bool
    made: Made | None = None


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor that is returned, or kept, as ``where``.

    ``value`` is a :class:`Ref`, known numbers with their ``origin``, or None for the output. ``state``: it is what a
    buffer of the block was changed to. ``number``: it is one element in Python.
    """

    where: str
    value: Any
    shape: tuple[int, ...]
    dtype: str
    origin: Origin | None = None
    state: bool = False
    number: bool = False


@dataclass(frozen=True, eq=False)
class Flow:
    """The record: operations in order, as far as the results need them; the output; every top-k on the way.

    ``results`` is the structure that the output is returned in, with :class:`Given` for leaves, if it isn't alone.
    ``branches`` are the comparisons of the batch size that it met; ``lone`` if it asked whether there is only one,
    and ``one_by_one`` if it takes tokens, or rows of them, out of the batch.
    ``positive`` are operations whose results the record took to be above zero in some places, and zero elsewhere.
    ``asked`` are the operations whose results were asked for these places, by what came of it.
    ``outside``: it chose some that it masks, since a record chooses without looking at what is ranked.
    ``within`` and ``beyond`` are fixed places at which it cuts the batch, or would cut a larger one.
    ``used`` are the weights that anything of this came of.
    ``kept`` are attributes that the block wrote, by module and name, with the values that they have after every call,
    or :class:`Given` for what came of the input; so are buffers that it changed.
    """

    ops: tuple[Op, ...]
    output: Ref
    choices: tuple[Choice, ...]
    results: Structure | None = None
    kept: dict[tuple[str, str], Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    lone: bool = False
    one_by_one: bool = False
    positive: tuple[tuple[Ref, Tensor], ...] = ()
    asked: Mapping[Asked, Ref] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    outside: bool = False
    within: frozenset[int] = frozenset()
    beyond: frozenset[tuple[int, int]] = frozenset()

    def like(self, other: Flow) -> bool:
        """Whether another record of the same call did the same, attributes that it keeps aside."""
        return self._alone() == other._alone()

    def _alone(self) -> list[tuple[Any, ...]]:
        """The operations that what it returns came of, numbered anew, with all but the numbers of tensors."""
        returned = [leaf.value for leaf in self.results.leaves() if isinstance(leaf, Given)] if self.results else []
        ends = [self.output, *(value for value in returned if isinstance(value, Ref))]
        waiting, scores = list(ends), {choice.made: choice.scores for choice in self.choices}
        needed: set[int] = set()
        while waiting:
            place = waiting.pop().index
            if place not in needed:
                needed.add(place)
                op = self.ops[place]
                waiting += [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Ref)]
                waiting += [scores[made] for made in chosen([op.origin] if op.origin else []) if made in scores]
        number = {place: count for count, place in enumerate(sorted(needed))}
        found: list[tuple[Any, ...]] = [tuple(number[end.index] for end in ends)]
        for place in number:
            op = self.ops[place]
            named = {name: value for name, value in op.kwargs.items() if name != "choice"}
            leaves = [leaf for leaf in tree_leaves((op.args, named)) if not isinstance(leaf, Tensor)]
            plain = [number[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in leaves]
            known = [str(leaf.tolist()) for leaf in tree_leaves(op.args) if isinstance(leaf, Tensor)]  # nan equals nan
            found.append((op.name, op.shape, op.dtype, plain, known))
        return found
