"""What known numbers in a record stand for, so that code which depends on load or position is noticed.

The expert ids that a record's top-k returns are real numbers, and so is all that code calculates from them: masks,
sorted orders, tokens per expert. In one record these numbers are right for one batch only. Each known tensor therefore
has a :class:`Kind`; what tells one load or position from another may be calculated, as statistics are, but not used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from torch import Tensor

from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.branches import tells_sizes_apart

LOAD = "how many tokens an expert gets, or where a token stands in the batch"


class Kind(IntEnum):
    """From what is the same in every batch to what differs most."""

    PLAIN = 0
    """The same in every batch."""
    VISITED = 1
    """Numbers of experts that some token chose."""
    CHOSEN = 2
    """Single tokens' choices of experts, or masks and such made of them one by one."""
    PLACED = 3
    """Masks made by comparing places of tokens, or numbers of them, with each other."""
    COUNT = 4
    """Numbers or places of tokens, their sums, differences and multiples. Nothing but the sign may be told."""
    PLACE = 5
    """Counts less one: places counted from zero. Nothing but whether there is one may be told."""
    DERIVED = 6
    """Calculated from counts. Good for indexing only."""
    LOAD = 7
    """Tells one load or one place from another. Nothing may come of it."""


_FAR = 1 << 40  # torch's own "to the end"
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARISONS = frozenset(_COMPARE)
DIVISIONS = frozenset(["mod", "remainder", "floordiv", "floor_divide", "div", "divide"])
_TURNED = {"lt": operator.gt, "le": operator.ge, "gt": operator.lt, "ge": operator.le}
_FRESH = frozenset("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split(" "))
_MOVES = frozenset(
    "view reshape _unsafe_view expand permute transpose t unsqueeze squeeze flatten unflatten select slice split "
    "split_with_sizes unbind clone detach alias _to_copy contiguous lift_fresh cat stack repeat flip copy fill zero "
    "index index_select gather take masked_select index_put scatter mul neg abs sign isfinite eye arange "
    "bitwise_and bitwise_or bitwise_xor bitwise_not logical_and logical_or logical_xor logical_not".split(" ")
)
_PICKS = frozenset("index index_select gather take masked_select".split(" "))
_LIMITS = frozenset("clamp clamp_min clamp_max minimum maximum where fmod pow".split(" "))
_COUNTS = frozenset("sum cumsum count_nonzero argsort nonzero".split(" "))
_EXTREMES = frozenset("all amax amin max min argmax argmin mean prod median mode".split(" "))
_TALLIES = frozenset("bincount histc scatter_add index_add".split(" "))
_UNIQUE = frozenset("_unique2 _unique unique_dim unique_consecutive".split(" "))


# Where an operation takes known numbers as places; anywhere else they are values.
_PLACES = {"index": 1, "index_put": 1, "gather": 2, "index_select": 2, "index_add": 2, "index_copy": 2}
_PLACES |= {"scatter": 2, "scatter_add": 2, "scatter_reduce": 2, "_grouped_mm": 2}


class Ledger:
    """Decides kinds. ``fixed`` are sizes that don't come from the batch; ``object_to`` makes the exception to raise.

    ``within`` are fixed places at which the batch was cut, ``beyond`` those that it doesn't reach, with its size there:
    a larger one would be cut, which only a record of such a one can show.
    """

    def __init__(self, fixed: set[int], object_to: Callable[[str], Exception]) -> None:
        self.fixed, self.object_to = fixed, object_to
        self.within: set[int] = set()
        self.beyond: set[tuple[int, int]] = set()
        self.whole = False  # whether no other record shows larger batches
        self._blank = False
        self._by_batch = False
        self.plain = False  # numbers of tokens that Python was given look like any others
        self.limits: dict[int, bool] = {}  # of a number of tokens by its tensor, whether it is a size of the batch
        self.reason = LOAD  # why the last result of kind LOAD is one

    def before(self, name: str, args: Sequence[Any], by_batch: bool) -> None:
        """Look at what the next operation may write to. ``by_batch`` says that it divides by a size of the batch."""
        self._by_batch = by_batch
        self._blank = name == "scatter" and uniform(args[0])

    def kinds(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        results: Sequence[Tensor],
        kind_of: Callable[[Tensor], Kind],
    ) -> list[Kind]:
        """The kinds of the tensors that aten operation ``name`` on known operands returns."""
        if "dim" in kwargs:
            args = [*args[:1], kwargs["dim"], *args[1:]]
        if kwargs.get("rounding_mode") is not None:
            name = "floor_divide"
        tensors = [arg for arg in _flat(args) if isinstance(arg, Tensor)]
        top = max(map(kind_of, tensors), default=Kind.PLAIN)
        if name in _FRESH or not tensors:
            return [Kind.PLAIN] * len(results)
        if top == Kind.LOAD:
            self.reason = ""
            return [top] * len(results)
        if name in _UNIQUE:
            first = Kind.VISITED if top <= Kind.CHOSEN else top
            return [first, *[Kind.COUNT] * (len(results) - 1)]
        if name == "sort" and self._batchwise(name, args):
            return [top, max(top, Kind.COUNT)]
        if name == "nonzero" and top <= Kind.CHOSEN and not self._batchwise(name, args):
            return [Kind.VISITED]
        if name in _COMPARE:
            return [self._compared(name, args, top, kind_of, results[0])]
        return [self._kind(name, args, top, kind_of)] * len(results)

    def _kind(self, name: str, args: Sequence[Any], top: Kind, kind_of: Callable[[Tensor], Kind]) -> Kind:
        if name == "scatter" and self._blank and isinstance(args[3], (int, float)) and kind_of(args[0]) == Kind.PLAIN:
            return min(top, Kind.PLACED)
        if name == "index_put" and len(args) > 3 and args[3]:
            return max(top, Kind.COUNT)
        if name in _PICKS and (kind_of(args[0]) > Kind.PLAIN or uniform(args[0])):
            return kind_of(args[0])
        if name in _MOVES:
            return top
        if name == "sub" and top == Kind.COUNT and _is_one(args[1]) and len(args) == 2:
            return Kind.PLACE
        if name == "masked_fill":
            return top if top < Kind.COUNT else Kind.DERIVED
        if name in ("add", "sub", "rsub"):
            pure = all(isinstance(arg, Tensor) and kind_of(arg) == Kind.COUNT for arg in args[:2])
            return top if top < Kind.COUNT or pure else Kind.DERIVED
        if name in ("floor_divide", "remainder", "div"):  # a quotient is rounded before it can be an index
            return self._divided(name, args, top)
        if name in _LIMITS:
            if name == "where" and kind_of(args[0]) <= Kind.CHOSEN:  # each token's own choices say which it is
                return top if top < Kind.COUNT else max(top, Kind.DERIVED)
            if top >= Kind.COUNT:
                return self._load(f"aten.{name}")
            return top
        if name in _TALLIES:
            return max(top, Kind.COUNT)
        if name == "searchsorted" and kind_of(args[0]) <= Kind.CHOSEN:  # how many of sorted choices come before
            wanted = args[1]
            return Kind.DERIVED if isinstance(wanted, Tensor) and kind_of(wanted) > Kind.PLAIN else Kind.COUNT
        if name in ("any", *_COUNTS, *_EXTREMES, "sort", "topk", "cummax", "cummin"):
            return self._reduced(name, args, top)
        sized = any(size not in self.fixed for arg in _flat(args) if isinstance(arg, Tensor) for size in arg.shape)
        return Kind.DERIVED if sized or top > Kind.PLAIN else Kind.PLAIN

    def _compared(
        self, name: str, args: Sequence[Any], top: Kind, kind_of: Callable[[Tensor], Kind], result: Tensor
    ) -> Kind:
        if top < Kind.COUNT:
            return top
        if self.plain:
            return Kind.PLACED
        kinds = [kind_of(arg) if isinstance(arg, Tensor) else Kind.PLAIN for arg in args[:2]]
        if min(kinds) >= Kind.COUNT:
            return Kind.PLACED if name == "eq" or self._always(args, kinds, result) else Kind.DERIVED
        number = args[kinds.index(min(kinds))]
        if isinstance(number, Tensor):
            alike = number.numel() > 0 and bool((number == number.reshape(-1)[0]).all())
            number = number.reshape(-1)[0].item() if alike and min(kinds) == Kind.PLAIN else "several numbers"
        compare = _COMPARE[name]
        if kinds[0] < kinds[1]:
            compare = _TURNED.get(name, compare)
        if top == Kind.DERIVED or isinstance(number, str):
            return self._load(f"compares it with {number}")
        if tells_sizes_apart(compare, number + 1 if top == Kind.PLACE else number):
            return self._load(f"compares it with {number}")
        return Kind.CHOSEN

    def _always(self, args: Sequence[Any], kinds: Sequence[Kind], result: Tensor) -> bool:
        """Whether places or numbers of tokens are compared with what none can reach: their own most, or all tokens.

        That they are all on one side shows in every record, of crowded tokens as of spread ones.
        """
        found = [place for place, arg in enumerate(args[:2]) if id(arg) in self.limits]
        if len(found) != 1 or not uniform(result) or kinds[1 - found[0]] > Kind.PLACE:
            return False
        limit, others = args[found[0]], args[1 - found[0]]
        most = int(others.max()) + (kinds[1 - found[0]] == Kind.PLACE) if others.numel() else None
        return self.limits[id(limit)] or int(limit) == most

    def _divided(self, name: str, args: Sequence[Any], top: Kind) -> Kind:
        if top < Kind.COUNT:
            return top
        by = args[1].item() if isinstance(args[1], Tensor) and args[1].numel() == 1 else args[1]
        if isinstance(by, Tensor):
            return self._load(f"aten.{name}")
        if by not in self.fixed and not (self._by_batch or self.plain):  # by T, of a place among k * T: a token's
            return self._load(f"divides it by {by}")
        return Kind.DERIVED

    def _reduced(self, name: str, args: Sequence[Any], top: Kind) -> Kind:
        if not self._batchwise(name, args):
            return top
        if name == "any":
            return Kind.CHOSEN if top <= Kind.CHOSEN else Kind.DERIVED
        if name in _COUNTS:
            return max(top, Kind.COUNT)
        return self._load(f"aten.{name}")

    def _load(self, how: str) -> Kind:
        self.reason = f"what it does depends on {LOAD} ({how})"
        return Kind.LOAD

    def takes_values(self, name: str, operands: Sequence[Any], kind_of: Callable[[Tensor], Kind]) -> bool:
        """Whether an operation on the input takes counts as values, not as places or masks."""
        return any(
            place != _PLACES.get(name) and kind_of(tensor) >= Kind.COUNT
            for place, operand in enumerate(operands)
            for tensor in _flat([operand])
            if isinstance(tensor, Tensor)
        )

    def single(self, name: str, args: Sequence[Any]) -> bool:
        """Whether an operation on the input takes single tokens, or rows of them, out of the batch by their place."""
        if name not in ("select", "unbind") or self.plain:
            return False
        shape = args[0].shape
        return shape[args[1] if len(args) > 1 else 0] not in self.fixed

    def check_cut(self, name: str, args: Sequence[Any], symbolic: bool) -> None:
        """Note where parts of a batch begin or end at a fixed place."""
        shape = args[0].shape
        if name not in ("slice", "split", "squeeze"):
            return
        if name == "squeeze":
            dims = range(len(shape)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
            if symbolic and any(shape[dim] not in self.fixed for dim in dims):
                raise self.object_to(f"{DEPENDS} (squeezes a dimension of the batch)")
            return
        place = 2 if name == "split" else 1
        size = shape[args[place] if len(args) > place else 0] if shape else 1
        if size in self.fixed:
            return
        ends = args[2:4] if name == "slice" else [args[1]] if name == "split" and isinstance(args[1], int) else []
        for end in ends:
            if end is not None and abs(end) < _FAR:
                self.cut(end, size)

    def cut(self, end: int, size: int) -> None:
        """Note that a dimension of the batch, of a ``size``, is cut at ``end``."""
        if abs(end) <= size:
            self.within.add(end)
        elif end < 0 or self.whole:
            raise self.object_to(f"{DEPENDS} (cuts the batch at {end})")
        else:
            self.beyond.add((end, size))

    def _batchwise(self, name: str, args: Sequence[Any]) -> bool:
        """Whether a reduction goes along a dimension whose size comes from the batch."""
        shape = args[0].shape
        if name == "nonzero":
            return any(size not in self.fixed for size in shape)
        given = [arg for arg in args[1:] if isinstance(arg, (int, list, tuple)) and not isinstance(arg, bool)]
        if name == "topk":
            given = given[1:]
        dims = given[0] if given else -1 if name in ("sort", "argsort", "topk") and shape else None
        chosen = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        return any(shape[dim] not in self.fixed for dim in chosen)


def _is_one(number: Any) -> bool:
    return bool(number == 1) if not isinstance(number, Tensor) else number.numel() == 1 and bool(number == 1)


def uniform(tensor: Tensor) -> bool:
    """Whether all elements of a known tensor are the same; those of a new one aren't any numbers."""
    return tensor.numel() == 0 or bool((tensor == tensor.reshape(-1)[0]).all()) or bool(tensor.isnan().all())


def _flat(args: Any) -> list[Any]:
    items: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            items += _flat(arg)
        else:
            items.append(arg)
    return items
