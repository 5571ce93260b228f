"""What reading a block gives: a :class:`Reading`, or :class:`Unreadable` with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe_surgery.answers import Structure
from moe_surgery.calling import PLAIN, Calling
from moe_surgery.spec import MoESpec
from moe_surgery.weights.layout import Layout, Piece

if TYPE_CHECKING:
    from moe_surgery.replay import Program


VALUES = "what it does depends on the values it computes"


class Unreadable(Exception):
    """Something in a block that reading can't account for; the message is the reason. Never leaves the library."""


class Unfollowed(Unreadable):
    """The block's forward raised an error of its own while it was recorded, after ``operations``."""

    def __init__(self, reason: str, operations: int = 0, *, answered: bool = False) -> None:
        """``answered``: it raised none, but its answer has another shape or dtype than its input."""
        super().__init__(reason)
        self.operations, self.answered = operations, answered


class Mistaken(Unreadable):
    """An objection of a record in which ``sizes`` of the batch may be others, which the code gives as plain numbers."""

    def __init__(self, reason: str, sizes: Iterable[int] = ()) -> None:
        super().__init__(reason)
        self.sizes = frozenset(sizes)


class Outside(Unreadable):
    """A record chose some of what it masks, which may be why it can't be read."""


class Silent(Unreadable):
    """Every token of a record was sent to experts that come to nothing, so that nothing shows what the others do."""


class Untold(Unreadable):
    """Nothing in a record can be told to be routed experts."""


class Broken(Unreadable):
    """The block can't run as it is, so that nothing inside it is worth replacing."""


@dataclass(frozen=True)
class ChildShape:
    """What a direct child of a block is, with its sizes.

    ``matrix`` (rows, columns), such as a router (E, H) or a gate (1, H); ``experts`` (E, I, H); ``mlp`` (S, H).
    """

    form: Literal["matrix", "experts", "mlp"]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return ("mlp " if self.form == "mlp" else "") + " ".join(str(dim) for dim in self.dims)


@dataclass(frozen=True)
class Reading:
    """What dataflow says a block computes: nothing in it was guessed, and nothing in the block is left over.

    ``combine`` is the formula in the block's own child names, such as
    ``experts + sigmoid(shared_expert_gate) * shared_expert``. ``children`` maps each child's name to its shape.
    ``calling`` says what it is called with, ``results`` what its output is returned in, if it isn't alone,
    and ``kept`` which attributes it writes, by module and name, with their values.
    ``above_zero`` names weights of which none may be below zero, or the reading doesn't hold.
    ``spare`` are weights that nothing comes of outside of training.
    ``program`` is the part of it that its own operations go on computing: a router that no spec says, and results.
    ``around`` says why the block around could not be read, where only its experts' module was.
    """

    spec: MoESpec
    layout: Layout
    combine: str
    children: tuple[tuple[str, ChildShape], ...]
    around: str = ""
    calling: Calling = PLAIN
    results: Structure | None = None
    kept: tuple[tuple[tuple[str, str], Any], ...] = ()
    above_zero: Piece | None = None
    spare: frozenset[str] = frozenset()
    program: Program | None = None
