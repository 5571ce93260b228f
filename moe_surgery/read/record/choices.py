"""Operations whose indices choose: top-k, and maxima and sorts of which the indices are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor

from moe_surgery.read.reading import Broken, Unreadable
from moe_surgery.read.record.known_numbers import Kind
from moe_surgery.read.record.masked import moved_inside, open_places
from moe_surgery.read.record.tensor_entries import tensors

if TYPE_CHECKING:
    from moe_surgery.read.record.flow import Route
    from moe_surgery.read.record.notebook import Notebook
    from moe_surgery.read.record.tensor_entries import Entry

_LOOKS_UP = frozenset(["index", "index_select", "embedding", "gather"])


@dataclass(eq=False)
class Made:
    """A choice while it is recorded: of what it ranks, made by ``record``; ``used`` if anything came of its indices.

    One that is looked up in a table of the block's ranks nothing: ``node`` is the table, and it is ``among`` so many.
    An ``ascending`` one gives its ids, which begin with the highest's, the other way round.
    """

    node: torch.fx.Node
    record: torch.fx.Node
    k: int
    ids: Tensor
    largest: bool
    used: bool = True
    among: int | None = None
    ascending: bool = False

    @property
    def given(self) -> Tensor:
        """The ids as its operation gives them."""
        return self.ids.flip(-1) if self.ascending else self.ids


class Choices:
    """The choices of a run; ``route`` says which of how many each takes."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._found: list[Made] = []
        self._unread: dict[int, Made] = {}  # by the storage of their ids

    def ids(self, rows: int, count: int, k: int) -> Tensor:
        """The ids [rows, k] that the next choice among ``count`` comes to: each choice is told by its own."""
        return (self._route(rows, count, k) + len(self._found)) % count

    def add(self, choice: Made, storage: int) -> None:
        """Another choice, whose ids have that storage."""
        self._found.append(choice)
        self._unread[storage] = choice

    def read(self, storage: int) -> None:
        """Something comes of the tensors of that storage."""
        if (choice := self._unread.pop(storage, None)) is not None:
            choice.used = True

    def made(self) -> list[Made]:
        """Those that anything came of."""
        return [choice for choice in self._found if choice.used]


def ranking(notebook: Notebook, name: str, args: Any, kwargs: Any) -> tuple[int, bool] | None:
    """How many an operation takes of the highest, and whether it is of the highest, if its indices are a choice.

    That is a top-k; and a maximum or a sort, if anything comes of their indices.
    """
    if name == "topk":
        k, dim, largest = (*args[1:4], *(-1, True)[len(args) - 2 :])[:3]
        if dim not in (-1, args[0].ndim - 1):
            notebook.reservations.append("it ranks along another dimension than the last")
            return None
        return k, largest
    if name not in ("max", "argmax", "sort") or notebook.route is no_choice or not args[0].ndim:
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1 if name == "sort" else None)
    size = args[0].shape[-1]
    if dim not in (-1, args[0].ndim - 1) or size in notebook.batch or args[0].ndim < 2:
        return None
    return size if name == "sort" else 1, True


def ascends(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation is a sort in ascending order."""
    return name == "sort" and not (args[2] if len(args) > 2 else kwargs.get("descending", False))


def choose(notebook: Notebook, record: torch.fx.Node, indices: Tensor, ranked: tuple[int, bool]) -> Tensor:
    """The numbers of the ``indices`` that ``record`` makes, which choose: how many, and whether the highest."""
    scores: Any = record.args[0]
    shape = scores.meta["val"].shape
    k, largest = ranked
    ids = notebook.choices.ids(shape[:-1].numel(), shape[-1], k)
    places = open_places(scores, notebook.consts) if largest else None
    if places is not None:
        places = places.reshape(-1, shape[-1])
        ids = moved_inside(ids, places) if notebook.inside else ids
        notebook.outside |= not bool(places.gather(1, ids).all())
    notebook.fixed.update((k, shape[-1]))
    name = record.meta["name"]
    made = Made(scores, record, k, ids, largest, name == "topk", ascending=ascends(name, record.args, record.kwargs))
    return _chosen(notebook, record, made, indices)


def _chosen(notebook: Notebook, record: torch.fx.Node, choice: Made, indices: Tensor) -> Tensor:
    """The numbers of a ``choice``, in the form of the ``indices`` that ``record`` makes."""
    record.meta["choice"] = choice
    record.meta.setdefault("val", indices)
    real = choice.given.reshape(indices.shape).to(indices.dtype, copy=True)
    notebook.lineage.chose(real, choice)
    entry = notebook.entries.enter(real, None, None, real, Kind.CHOSEN)
    notebook.choices.add(choice, entry.storage)
    return real


def looked_up(notebook: Notebook, name: str, args: Any, entries: dict[int, Entry]) -> bool:
    """Whether an operation looks whole numbers up in a table of the block's, by what was chosen or is given to it.

    Such numbers are a choice of experts: by token ids, or of those that stand for the experts of a top-k. So is what
    remains of token ids where they are divided by the number of experts.
    """
    if name == "remainder":
        given = entries[id(args[0])].node if isinstance(args[0], Tensor) else None
        whole = given is not None and not args[0].is_floating_point() and _given_beside(given)
        return whole and type(args[1]) is int and args[1] in notebook.counts and notebook.route is not no_choice
    if name not in _LOOKS_UP or notebook.route is no_choice or args[0].is_floating_point() or not notebook.counts:
        return False
    table, places = entries[id(args[0])], [entries[id(leaf)] for leaf in tensors(args[1:])]
    if table.node is None or args[0].dtype is torch.bool or not places or not _of_weights(table.node):
        return False
    return all(p.node is not None or p.kind in (Kind.PLAIN, Kind.CHOSEN) for p in places)


def _of_weights(node: torch.fx.Node) -> bool:
    """Whether nothing but weights is in what ``node`` makes."""
    inputs = node.all_input_nodes
    return all(map(_of_weights, inputs)) if inputs else node.op == "get_attr"


def _given_beside(node: torch.fx.Node) -> bool:
    """Whether nothing but a tensor beside the block's input is in what ``node`` makes."""
    inputs = node.all_input_nodes
    return all(map(_given_beside, inputs)) if inputs else bool(node.meta.get("beside"))


def look_up(notebook: Notebook, record: torch.fx.Node, indices: Tensor) -> Tensor | None:
    """The numbers of the ``indices`` that ``record`` looks up; None if they aren't so many for each token."""
    k, left = divmod(indices.numel(), notebook.tokens)
    remains: Any = record.args[1]
    among: int = remains if record.meta["name"] == "remainder" else notebook.counts[0]
    if left or not 1 <= k <= among:
        return None
    ids = notebook.choices.ids(notebook.tokens, among, k)
    if len(ids) > 1:  # no function of what another choice came to
        ids = torch.cat([ids[:-1], (ids[-1:] + 1) % among])
    table: Any = record.args[0]
    choice = Made(table, record, k, ids, True, used=False, among=among)
    notebook.fixed.update((k, among))
    return _chosen(notebook, record, choice, indices)


def any_places(notebook: Notebook, indices: Tensor, dim: int) -> Tensor:
    """Numbers for the ``indices`` of a top-k that isn't read, so that the code which uses them runs."""
    count = indices.shape[dim]
    real = torch.arange(count).reshape([-1, *[1] * (indices.ndim - 1)]).transpose(0, dim).expand(indices.shape)
    real = real.contiguous()
    notebook.entries.enter(real, None, None, real, Kind.CHOSEN)
    return real


def check_top_k(scores: Tensor, k: int, dim: int = -1) -> None:
    count = scores.shape[dim] if scores.ndim else 1
    if not 1 <= k <= count:
        raise Broken(f"it asks for the top {k} of {count}, so it can't run")


def no_choice(rows: int, choices: int, k: int) -> Tensor:
    """The route of a module of experts alone."""
    raise Unreadable("its experts choose among themselves")
