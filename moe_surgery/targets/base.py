"""The protocol every target fulfils."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from moe_surgery.errors import SurgeryError
from moe_surgery.replay import ENTERING, Begun
from moe_surgery.spec import MoESpec
from moe_surgery.targets.convention import Convention
from moe_surgery.targets.likeness import Standing
from moe_surgery.targets.observed import ObservedRouter
from moe_surgery.weights.moving import moving
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


@dataclass(frozen=True, eq=False)
class Arguments:
    """What routed experts are called with: tokens [..., H], ids and weights [..., k].

    Where they stand for a whole block, ``x`` is the block's input as tokens, ``begun`` what its own operations made of
    it, and ``given`` the input as it was given. Of experts that are called with tokens in slots, ``given`` are these.
    """

    hidden_states: Tensor
    ids: Tensor
    weights: Tensor
    x: Tensor | None = None
    begun: Begun | None = None
    given: Tensor | None = None


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

    def prepare(self, numbers: Sequence[int]) -> None:
        """Compile what calls with these ``numbers`` of tokens need, side by side; by default nothing. May raise."""

    def arguments(self, given: Sequence[Tensor], named: Mapping[str, Tensor]) -> Arguments:
        """The tokens, ids and weights that a module of experts alone was called with.

        Where it stands for a whole block with a router of its own, that was called with tokens only, and its router
        gives the rest.
        """
        if self.convention is None:
            if len(given) != 3 or named:
                raise TypeError("experts take tokens, ids and weights")
            return Arguments(given[0], given[1], given[2])
        tensors = self.convention.calling.taken(given, named)
        if "ids" in tensors:
            return Arguments(tensors["hidden_states"], tensors["ids"], tensors["weights"], given=tensors.get("slots"))
        x = self.convention.calling.tokens(tensors["hidden_states"])
        begun = self.convention.begun(x, tensors)
        assert begun is not None
        found = begun.outputs
        entering = found.get(ENTERING, x)
        entering = entering.reshape(*x.shape[:-1], entering.shape[-1])
        return Arguments(entering, found["ids"], found["weights"], x, begun, tensors["hidden_states"])

    def answered(self, arguments: Arguments, routed: Tensor) -> Any:
        """What a call with ``arguments`` returns whose routed experts came to ``routed`` [..., H]."""
        convention = self.convention
        x, begun, given = arguments.x, arguments.begun, arguments.given
        if given is not None and x is None:  # slots
            return routed.view(given.shape)
        if convention is None or convention.own is None or x is None or begun is None or given is None:
            return routed
        return self.answer(x, convention.own.around(begun, x, routed), begun, given)

    def answer(self, x: Tensor, output: Tensor, begun: Begun | None, given: Tensor) -> Any:
        """What a call with ``x`` returns whose output is ``output``; attributes are written as the old block did.

        ``given`` is its input as it was given, and the output is to lie as that does.
        """
        assert self.convention is not None
        output = self.convention.calling.back(output, given)
        replayed = begun.outputs if begun is not None else {}
        for (path, name), value in self.convention.values(x, replayed):
            self.write(path, name, value)
        for name, where in self.convention.state:
            self.write_buffer(name, replayed[where])
        return self.convention.answer(x, output, replayed)

    def write(self, path: str, name: str, value: Any) -> None:
        """Give the attribute ``name`` of the old block's module ``path`` a value. By default it has none."""

    def write_buffer(self, name: str, value: Tensor) -> None:
        """Change the old block's buffer ``name``, as every call of it did. By default there is none."""

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise :class:`SurgeryError` if ``fn``, which ``Module.to`` and the like apply to every tensor, can't be."""

    def observe(self, name: str, router: ObservedRouter) -> None:
        """Keep the old router as child ``name``, if others may have hooks on it. By default it isn't needed."""


class StandingBlock(Standing, SwappedBlock):
    """A swapped block of a plain model, which answers for the one that stood in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and (moves := moving(value)) is not None:
            path = self.label if self.likeness is None else self.likeness.path
            raise SurgeryError(
                f"{path}: {moves} would move the weights of a swapped MoE block, which lie in its kernels' layout; "
                "undo first"
            )
        super().__setattr__(name, value)

    def _slow_forward(self, *args: object, **kwargs: object) -> NoReturn:
        """What torch calls for ``forward`` while it traces."""
        raise SurgeryError(
            "a swapped MoE block can't be traced by torch.jit, which would keep the experts of this one input for all "
            "others; undo first, or use torch.export or torch.compile"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch calls before it compiles a module's code."""
        raise SurgeryError("a swapped MoE block can't go through torch.jit.script; undo first, or use torch.compile")

    def write(self, path: str, name: str, value: Any) -> None:
        for attributes in self.attributes(path):
            attributes[name] = value

    def write_buffer(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.get_buffer(name).copy_(value)

    def hold_buffers(self, block: nn.Module, names: Iterable[str]) -> None:
        """Have those buffers of ``block`` under their ``names``, by reference; call this before :meth:`stand_for`."""
        for name in names:
            lasting = name not in block._non_persistent_buffers_set
            self.register_buffer(name, block.get_buffer(name), persistent=lasting)

    def hand_back_buffers(self, block: nn.Module) -> None:
        """Give ``block``, which stood here and does again, its buffers as they are now."""
        for name in block._buffers.keys() & self._buffers.keys():
            block._buffers[name] = self._buffers[name]

    def places(self) -> tuple[tuple[str, str], ...]:
        """The attributes that a call writes, each by the old block's module and its name."""
        return tuple(place for place, _ in self.convention.written) if self.convention is not None else ()

    def written(self) -> dict[tuple[str, str], Any]:
        """What the last call wrote."""
        return {(path, name): next(iter(self.attributes(path)))[name] for path, name in self.places()}

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Afterwards the attributes that a call writes are what they were."""
        held = [attributes for path, _ in self.places() for attributes in self.attributes(path)]
        before = [dict(attributes) for attributes in held]
        try:
            yield
        finally:
            for attributes, then in zip(held, before, strict=True):
                attributes.clear()
                attributes.update(then)

    def attributes(self, path: str) -> Iterator[dict[str, Any]]:
        """Wherever the plain attributes of the old block's module ``path`` are, to be written to."""
        first, _, rest = path.partition(".")
        held = self._modules.get(first)
        if isinstance(held, Standing) and held.likeness is not None:  # the old router, which may be asked itself
            yield held.likeness.attributes(rest)
        if self.likeness is not None:
            yield self.likeness.attributes(path)


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
