"""Asking a block: recorded with inputs of many shapes, tokens sent to many sets of experts, on every branch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.calling import Calling
from moe_surgery.read.parsed import Record, parse_record
from moe_surgery.read.reading import Silent, Unfollowed, Unreadable
from moe_surgery.read.record.batch_size import DEPENDS
from moe_surgery.read.record.block_run import record
from moe_surgery.read.record.flow import Flow, Route
from moe_surgery.read.record.state import Watch

FEW = (3, 7)
"""Rows and columns of a small batch, which are seldom sizes of anything else."""
_MOST_BRANCHES = 3  # each doubles the records


class Records:
    """The records of one ``block`` so far, as nothing else comes of the same call; holds while nobody changes it."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._made: dict[Hashable, Flow | Unreadable] = {}

    def once(self, key: Hashable, make: Callable[[], Flow]) -> Flow:
        """The record of the call that ``key`` tells of. Raises :class:`Unreadable` as ``make`` did."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except Unreadable as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, Unreadable):
            raise found.with_traceback(None)
        return found


@dataclass(frozen=True, eq=False)
class Asking:
    """A block that is asked with inputs of many shapes: ``calling`` is how, ``parse`` what its records are read by.

    ``inside``: it is sent to experts of the groups that it chose.
    """

    records: Records
    calling: Calling
    parse: Callable[[Flow, torch.dtype], Record] = parse_record
    inside: bool = False
    _watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_watch", Watch(self.block))

    @property
    def block(self) -> nn.Module:
        return self.records.block

    def record(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        route: Route,
        *,
        plain: bool = False,
        more: Mapping[str, Any] | None = None,
        turned: frozenset[str] = frozenset(),
        calling: Calling | None = None,
    ) -> Flow:
        """A record of the block, as :func:`~moe_surgery.read.record.block_run.record` makes it."""
        how: dict[str, Any] = {"plain": plain, "turned": turned, "calling": calling or self.calling}
        made = partial(record, self._watch, shape, dtype, route, inside=self.inside, more=more, **how)
        return made() if more else self.records.once((shape, dtype, route, self.inside, *how.items()), made)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, route: Route, *, plain: bool = False) -> Record:
        try:
            found, others = self.on_all_branches(shape, dtype, route, plain=plain)
        except Silent:  # the few that it was sent to come to nothing
            if route is crowded_together:
                raise
            return self(shape, dtype, crowded_together, plain=plain)
        for turned, other in others:
            if other is None or other.says != found.says:
                raise Unreadable(f"{DEPENDS} (compares it with {min(turned).rpartition(' ')[2]})")
            found = found.with_beyond(other.beyond)
        return found

    def on_all_branches(
        self, shape: tuple[int, ...], dtype: torch.dtype, route: Route, *, plain: bool = False
    ) -> tuple[Record, list[tuple[frozenset[str], Record | None]]]:
        """A record, and those in which some comparisons are answered the other way; None for one that can't be read."""
        flow = self.record(shape, dtype, route, plain=plain)
        found = self.parse(flow, dtype)
        others: list[tuple[frozenset[str], Record | None]] = []
        for turned in _some(flow.branches):
            other = None
            with suppress(Unreadable):
                turned_flow = self.record(shape, dtype, route, plain=plain, turned=turned)
                if set(turned_flow.branches) <= set(flow.branches):
                    other = self.parse(turned_flow, dtype)
            others.append((turned, other))
        return found, others

    def if_it_takes(self, shape: tuple[int, ...], dtype: torch.dtype, *, plain: bool = False) -> list[Record]:
        """A record; none where the block's own forward doesn't take such an input."""
        if not self.takes(shape, dtype, plain=plain):
            return []
        return [self(shape, dtype, crowded_together, plain=plain)]

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype, *, plain: bool = False) -> bool:
        """Whether the block's own forward takes such an input."""
        try:
            self.record(shape, dtype, crowded_together, plain=plain)
        except Unfollowed:
            return False
        return True


def _some(branches: tuple[str, ...]) -> list[frozenset[str]]:
    """Which comparisons to answer the other way round, one after another."""
    if len(branches) > _MOST_BRANCHES:
        raise Unreadable(f"{DEPENDS} (compares it with {len(branches)} numbers)")
    return [frozenset(some) for count in range(1, len(branches) + 1) for some in combinations(branches, count)]


def crowded_together(rows: int, choices: int, k: int) -> Tensor:
    """Every token on one of two sets of experts, in descending order; but the first on the first experts."""
    ids = (choices - 1 - torch.arange(k)[None, :] - torch.arange(rows)[:, None] % 2) % choices
    ids[:1] = k - 1 - torch.arange(k)
    return ids


def together(rows: int, choices: int, k: int) -> Tensor:
    """Every token on the same experts, far from each other."""
    return (torch.arange(k) * choices // k).expand(rows, k).contiguous()


def spread(rows: int, choices: int, k: int) -> Tensor:
    """Sets of experts without a pattern, of which the first visit every expert."""
    generator = torch.Generator().manual_seed(rows)
    order = torch.randperm(choices, generator=generator)
    first = [order[start : start + k] for start in range(0, choices - k, k)] + [order[choices - k :]]
    others = torch.rand(max(rows - len(first), 0), choices, generator=generator).argsort(-1)[:, :k]
    return torch.cat([torch.stack(first)[:rows], others])


def rolled(rows: int, choices: int, k: int) -> Tensor:
    """Sets of experts of which as many as there are experts visit every one first."""
    order = torch.randperm(choices, generator=torch.Generator().manual_seed(rows))
    return order[(torch.arange(rows)[:, None] + torch.arange(k)[None, :]) % choices]
