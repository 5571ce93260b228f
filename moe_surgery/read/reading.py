"""The values that finding passes on: a site, what was read there, and whether a rule matched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe_surgery.spec import MoESpec
from moe_surgery.weights.layout import Layout

if TYPE_CHECKING:
    from torch import nn


class Unreadable(Exception):
    """Something in a block that reading can't account for; the message is the reason. Never leaves the library."""


class Unfollowed(Unreadable):
    """The block's forward raised an error of its own while it was recorded."""


@dataclass(frozen=True, eq=False)
class Site:
    """One candidate place in the module tree: a module that looks like a sparse-MoE block."""

    path: str
    module: nn.Module

    @property
    def kind(self) -> str:
        """The class name of the block, for people; nothing is decided by it."""
        return type(self.module).__name__


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
    ``around`` says why the block around could not be read, where only its experts' module was.
    """

    spec: MoESpec
    layout: Layout
    combine: str
    children: tuple[tuple[str, ChildShape], ...]
    around: str = ""


@dataclass(frozen=True)
class Clue:
    """One clause held against a site: what was wanted, what was measured, and whether it held."""

    clause: str
    held: bool
    wanted: str
    measured: str

    def __str__(self) -> str:
        return f"{'✓' if self.held else '✗'} {self.clause}: wanted {self.wanted}, measured {self.measured}"


@dataclass(frozen=True)
class Match:
    """A rule holds at a site. ``letters`` are the shape letters it bound (E, H, I, S)."""

    site: Site
    reading: Reading
    rule: str
    letters: tuple[tuple[str, int], ...]
    trail: tuple[Clue, ...]


@dataclass(frozen=True)
class Miss:
    """No rule holds at a site, or it could not be read. Falsy; ``reason`` is formatted only when asked for."""

    site: Site
    trail: tuple[Clue, ...]
    unread: str | None = None

    def __bool__(self) -> bool:
        return False

    @property
    def reason(self) -> str:
        if self.unread is not None:
            return self.unread
        return "; ".join(str(clue) for clue in self.trail if not clue.held)
