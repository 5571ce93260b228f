"""The protocol every target fulfils."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import Convention
from moe_surgery.targets.likeness import Standing
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.weights.tensors import BlockTensors


@dataclass(frozen=True)
class Context:
    """Where a block is to run: ``device`` type ("cpu", "cuda") and ``dtype`` name ("float32", "bfloat16", …).

    ``live`` is false where only a plan is made, from a config: a target then answers from what it knows of the engine,
    without importing it. Before anything is built it is asked again.
    """

    device: str
    dtype: str
    live: bool = True


@dataclass(frozen=True)
class Refusal:
    """Why a target can't take a spec, with the arithmetic where there is any."""

    reason: str


class SwappedBlock(nn.Module):
    """Base of every block that this library puts into a model, so that a second run leaves it alone.

    ``label`` is what reports print for it, ``rule`` the rule that put it there. ``new_bytes`` were allocated for it,
    ``moved_bytes`` are shared with the block it replaces.
    """

    label: str = ""
    rule: str | None = None
    new_bytes: int = 0
    moved_bytes: int = 0
    convention: Convention | None = None
    """How the block it replaces is called and what it returns, where that isn't its input and its output alone."""

    def arguments(self, given: Sequence[Tensor], named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens, ids and weights that a module of experts alone was called with."""
        if self.convention is None:
            if len(given) != 3 or named:
                raise TypeError("experts take tokens, ids and weights")
            return given[0], given[1], given[2]
        tensors = self.convention.calling.taken(given, named)
        return tensors["hidden_states"], tensors["ids"], tensors["weights"]

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise :class:`SurgeryError` if ``fn``, which ``Module.to`` and the like apply to every tensor, can't be."""

    def observe(self, name: str, router: ObservedRouter) -> None:
        """Keep the old router as child ``name``, if others may have hooks on it. By default it isn't needed."""


class StandingBlock(Standing, SwappedBlock):
    """A swapped block of a plain model, which answers for the one that stood in its place."""


class Target(Protocol):
    """A kind of block. ``name`` is what ``--target`` takes; ``label`` is what reports print."""

    name: str

    @property
    def label(self) -> str: ...

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """None if ``build`` would succeed in ``context``; decided without touching weights or the GPU."""
        ...

    def remark(self, spec: MoESpec, context: Context) -> str | None:
        """What a plan is to say beyond that ``spec`` is accepted, if anything."""
        ...

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> StandingBlock:
        """A block computing ``spec`` with ``tensors``, on their device, in their dtype.

        Its forward takes ``[..., H]`` and returns the same shape. ``tensors`` are never written to; they are used by
        reference where the kernels take them as they are. ``prefix`` is the block's path in the model, unique in it.
        Raises :class:`~moe_surgery.errors.UnsupportedError` if the engine can't host the block.
        """
        ...
