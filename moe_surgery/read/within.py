"""A block of which the routed experts alone are understood, wherever they stand in it.

Of a record this makes one that starts at what the experts are given and at ids and routing weights, and ends where the
experts' outputs are added up. What comes before (a norm, a router) and after (a residual, several shared experts, a
learned mix, another norm) is left to the block's own operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from moe_surgery.read.meaning.interpreter import Interpreter
from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.row_moves import MEANINGS as ROW_MOVES
from moe_surgery.read.parsed import Cut, Record, parse_record
from moe_surgery.read.reading import Silent, Unreadable, Untold
from moe_surgery.read.record.flow import Flow, Op, Ref
from moe_surgery.read.record.zeros import SHAPED
from moe_surgery.read.split import Trying, check_positive, cuts, given_weights, may_be_partial, of_cut

_MAPS = frozenset(["mm", "bmm", "addmm", "baddbmm", "_grouped_mm"])
_MOST_ENTRANCES = 3
_SHAPES = SHAPED | {"_unsafe_view", "_to_copy"}


@dataclass(eq=False)
class Within(Trying):
    """Parses the records of one block.

    What as many operations come of as of the experts' sum in the record before is tried first: of tokens that visit no
    expert after it, it would end later.
    """

    _left: int = -1
    _silent: bool = False

    def __call__(self, flow: Flow, dtype: torch.dtype) -> Record:
        """What a record says of every token's routed experts.

        Raises :class:`~moe_surgery.read.reading.Unreadable` if there are none that can be told from the rest.
        """
        check_positive(flow)
        self._silent, left = False, _left_behind(flow)
        pairs = (
            ((number, cut.kind), entrance, cut)
            for (number, entrance), cut in product(enumerate(_entrances(flow)), cuts(flow))
        )
        found = self.first_whole(pairs, lambda pair: self._parsed(flow, dtype, pair[1], pair[2], left))
        if found is not None:
            return found
        raise (Silent if self._silent else Untold)("its routed experts can't be told from what stands around them")

    def _parsed(self, flow: Flow, dtype: torch.dtype, entrance: int | None, cut: Cut, left: list[int]) -> Record | None:
        """The record with ``entrance`` and ``cut``, where its experts' sum is found.

        ``left`` is how many operations come of each result.
        """
        if entrance == cut.weights:
            return None
        split, moved = given_weights(flow if entrance is None else _started(flow, entrance), cut)
        run = Interpreter(split, Terms())
        size = next(op for op in split.ops if op.name == "input" and op.args[0] == "hidden_states").shape[-1]
        places = _sums(flow, max(cut.weights or 0, entrance or 0), size)
        for place in sorted(places, key=lambda place: left[place] != self._left):
            ended = replace(split, output=Ref(moved(place)), results=None, kept={})
            try:
                found = parse_record(ended, dtype, run)
                if all(token.shared is None and token.output_bias is None for token in found.tokens):
                    record = of_cut(found, flow, replace(cut, entering=entrance, routed=place))
                    if not may_be_partial(record):
                        self._left = left[place]
                    return record
            except Unreadable as error:
                self._silent |= isinstance(error, Silent)
        return None


def _left_behind(flow: Flow) -> list[int]:
    """How many operations come of each result, but for those that only shape or convert it: some records have more."""
    found: list[int] = []
    following: dict[int, int] = {}  # as bits, the last operation's first, which later ones need no room for
    counted = 0
    for place, op in reversed(list(enumerate(flow.ops))):
        after = following.pop(place, 0)
        found.append((after & counted).bit_count())
        bit = 1 << (len(flow.ops) - 1 - place)
        counted |= bit if op.name not in _SHAPES else 0
        for operand in op.operands:
            following[operand] = following.get(operand, 0) | after | bit
    return found[::-1]


def _entrances(flow: Flow) -> Iterator[int | None]:
    """Operations that may give the experts' input; None for the block's own, which is likeliest."""
    sources = Counter(source for op in flow.ops if op.name in _MAPS for source in _sources(flow, op))
    yield None
    found = [index for index, _ in sources.most_common() if flow.ops[index].name != "input"]
    yield from (index for index in found[:_MOST_ENTRANCES] if _of_tokens(flow, flow.ops[index]))


def _sources(flow: Flow, op: Op) -> Iterator[int]:
    """What the operands of a linear map are rows of."""
    refs = [operand for operand in op.args if isinstance(operand, Ref)]
    if not any(_source(flow, ref.index) is None for ref in refs):
        return  # no weight takes part
    for ref in refs:
        if (source := _source(flow, ref.index)) is not None:
            yield source


def _source(flow: Flow, index: int) -> int | None:
    """The operation whose rows a tensor has; None if it is a weight."""
    while True:
        op = flow.ops[index]
        if op.name == "param":
            return None
        taken = flow.ops[op.args[0].index] if op.name == "item" else op
        moves = taken.name in ROW_MOVES or taken.name in ("_to_copy", "gather")
        ref = next((item for item in _operands(op.args[0]) if isinstance(item, Ref)), None) if moves else None
        if ref is None or (_of_tokens(flow, op) and op.name == "_to_copy"):
            return index
        index = ref.index


def _operands(operand: Any) -> tuple[Any, ...]:
    return tuple(operand) if isinstance(operand, (list, tuple)) else (operand,)


def _of_tokens(flow: Flow, op: Op) -> bool:
    """Whether a result is one vector, of the input's size or another, for each token."""
    start = next(op for op in flow.ops if op.name == "input")
    tokens = torch.Size(start.shape[:-1]).numel()
    return op.shape[:-1] in (start.shape[:-1], (tokens,)) and op.dtype in (start.dtype, "float32")


def _sums(flow: Flow, after: int, size: int) -> Iterator[int]:
    """Operations that may give the sum of the experts' outputs, vectors of a ``size``, latest first."""
    for place in range(len(flow.ops) - 1, after, -1):
        if _of_tokens(flow, flow.ops[place]) and flow.ops[place].shape[-1] == size:
            yield place


def _started(flow: Flow, entrance: int) -> Flow:
    """The record with what operation ``entrance`` gives as the tokens, and its input as something else."""
    ops = list(flow.ops)
    start = next(index for index, op in enumerate(ops) if op.name == "input")
    ops[start] = replace(ops[start], args=("outer",))
    ops[entrance] = Op("input", ("hidden_states",), {}, ops[entrance].shape, ops[entrance].dtype)
    return replace(flow, ops=tuple(ops))
