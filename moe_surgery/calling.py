"""How a block is called: its arguments.

A block that takes more than its input is replaced by one that does the same. What it was read with holds for that only:
an argument that was at its default must be at its default again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_surgery.companion import Companion, made_up
from moe_surgery.errors import SurgeryError
from moe_surgery.form import Form
from moe_surgery.slots import Slots

Role = Literal["hidden_states", "ids", "weights", "beside", "unused", "fixed"]
_TENSORS = ("hidden_states", "ids", "weights")
_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class Argument:
    """One argument of a block's forward. ``many`` is "*" or "**" for those that gather others.

    "unused" ones are named by no code of the forward, so that any value will do; "fixed" ones must be what they were
    when the block was read, ``default``, or nothing where there are ``many``; ``required`` ones must be given as that.
    "beside" ones are tensors that the block's own operations take, of the form that ``companion`` says. A ``gathered``
    one is the first of those that ``*given`` takes.
    """

    name: str
    role: Role
    many: Literal["", "*", "**"] = ""
    default: Any = field(default=None, compare=False)
    by_name_only: bool = False
    required: bool = False
    companion: Companion | None = None
    gathered: bool = False


class UnreadCall(SurgeryError):
    """A call with a ``value`` for ``argument`` that the block wasn't read with; ``told`` is what to call that."""

    def __init__(self, argument: str, value: object = None, told: str = "") -> None:
        self.argument, self.value, self.told = argument, value, told or f"a value for {argument}"
        super().__init__(
            f"a replaced block was called with {self.told} that it was not read with; undo, or leave the block alone "
            "with skip="
        )


@dataclass(frozen=True)
class Calling:
    """All arguments of a block's forward in order. ``form`` is how its input lies, where that isn't [B, S, H].

    Of a module of experts alone that is called with tokens in ``slots``, these are its input. Any other may have as
    many ``dimensions`` as those that the block was read with. Some are told where tokens go by masks [T, k, E] of so
    many experts, in which the one that counts is 1 and all others are 0, instead of ids [T, k].
    """

    arguments: tuple[Argument, ...]
    form: Form | None = None
    slots: Slots | None = None
    dimensions: frozenset[int] = frozenset([2, 3])
    masks: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the block takes its input and nothing else."""
        return (
            self.form is None
            and self.slots is None
            and [argument.role for argument in self.arguments] == ["hidden_states"]
        )

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The tensors that the block takes beside its input."""
        return tuple(argument.companion for argument in self.arguments if argument.companion is not None)

    def placed(self, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        """Positional arguments by role; what is unused and has no default is None.

        An argument beside the tensors may be given by its name. Companions that aren't among the tensors are made up.
        Tokens [B, S, H], or [T, H], are brought into the block's ``form``, or into ``slots`` where ids are given.
        """
        if self.slots is not None and "ids" in tensors:
            tensors = {**tensors, "hidden_states": self.slots.given(tensors)}
        if self.masks is not None and "ids" in tensors:
            tensors = {**tensors, "ids": _as_masks(tensors["ids"], self.masks)}
        if self.form is not None:
            tensors = {**tensors, "hidden_states": self.form.given(tensors["hidden_states"])}
        wanted = [argument for argument in self.arguments if not argument.many and not argument.by_name_only]
        given = {
            argument.name: tensors[key]
            for argument in wanted
            for key in (argument.role, argument.name)
            if key in tensors and argument.companion is None
        }
        beside = made_up(self.companions, tensors["hidden_states"], tensors) if self.companions else {}
        given |= {a.name: beside[a.companion.key] for a in wanted if a.companion is not None}
        values = [given.get(argument.name, argument.default) for argument in wanted]
        last = max(number for number, argument in enumerate(wanted) if argument.name in given)
        needed = [
            n for n, argument in enumerate(wanted) if argument.required or argument.default is dataclasses.MISSING
        ]
        values = [None if value is dataclasses.MISSING else value for value in values]
        return tuple(values[: max([last, *needed]) + 1])

    def taken(self, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors by role, out of the arguments of a call; the input in the block's ``form``.

        Raises what a call does that the block wasn't read for.
        """
        by_place = [argument for argument in self.arguments if not argument.many and not argument.by_name_only]
        by_name = {argument.name: argument for argument in self.arguments if not argument.many}
        gathers = {argument.many: argument for argument in self.arguments if argument.many}
        found = [(argument, value) for argument, value in zip(by_place, given, strict=False)]
        if more := given[len(by_place) :]:
            if "*" not in gathers:
                raise TypeError(f"the block takes {len(by_place)} arguments, got {len(given)}")
            found.append((gathers["*"], more))
        for name, value in named.items():
            argument = by_name.get(name) or gathers.get("**")
            if argument is None:
                raise TypeError(f"the block has no argument {name!r}")
            if any(argument is other and not argument.many for other, _ in found):
                raise TypeError(f"the block got two values for {name!r}")
            found.append((argument, value))
        for argument, value in found:
            if argument.role == "fixed" and (argument.many or not _same(value, argument.default)):
                raise UnreadCall(f"{argument.many}{argument.name}", value)
        tensors: dict[str, Any] = {argument.role: value for argument, value in found if argument.role in _TENSORS}
        for argument, value in found:
            if argument.companion is not None:
                if not argument.companion.fits(value, tensors["hidden_states"]):
                    raise UnreadCall(argument.name, value)
                tensors[argument.companion.key] = value
        if "hidden_states" in tensors:
            self.check(tensors["hidden_states"])
            tensors |= {} if self.slots is None else self.slots.taken(tensors["hidden_states"])
        if self.masks is not None and "ids" in tensors:
            tensors["ids"] = self._ids(tensors["ids"], self.masks)
        there = {argument.name for argument, _ in found}
        for argument in self.arguments:
            if (argument.role in _TENSORS or argument.required) and argument.name not in there:
                raise TypeError(f"the block needs its argument {argument.name!r}")
            if argument.companion is not None and argument.name not in there:
                raise UnreadCall(argument.name)
        return tensors

    def check(self, x: Any) -> None:
        """Raise :class:`UnreadCall` for an input ``x`` that doesn't lie as those that the block was read with."""
        if self.slots is not None:
            fits = self.slots.fits(x)
        else:
            fits = x.ndim in self.dimensions if self.form is None else x.ndim == self.form.dimensions
        if not fits:
            name = next(a.name for a in self.arguments if a.role == "hidden_states")
            raise UnreadCall(name, x, f"{name} of {x.ndim} dimensions")

    def _ids(self, masks: Any, experts: int) -> Any:
        """The ids [T, k] that masks [T, k, E] tell; one beyond the experts where no expert counts."""
        import torch

        if masks.ndim != 3 or masks.shape[-1] != experts or masks.dtype != torch.int64:
            raise UnreadCall(next(a.name for a in self.arguments if a.role == "ids"), masks)
        hit = masks == 1
        count = hit.sum(-1)
        fits = (masks == hit).all() & (count <= 1).all()  # asked where it lies: nobody waits for a GPU
        torch._assert_async(fits, "a replaced block was called with a mask that is no one of one expert, or of none")
        return hit.int().argmax(-1).masked_fill(count == 0, experts)

    def tokens(self, x: Any) -> Any:
        """An input or output of the block as tokens, [B, S, H] where it lies in a ``form`` of its own."""
        return x if self.form is None else self.form.tokens(x)

    def combined(self, y: Any, tensors: Mapping[str, Any]) -> Any:
        """What comes of an output for ``tensors`` that were :meth:`placed`, as tokens."""
        return self.tokens(y) if self.slots is None else self.slots.combined(y, tensors)

    def back(self, x: Any, given: Any) -> Any:
        """Tokens of the shape that :meth:`tokens` gave to ``given``, lying as that does."""
        return x if self.form is None else self.form.back(x, self.form.lead(given))


def _as_masks(ids: Any, experts: int) -> Any:
    """Masks [T, k, E] that tell ids [T, k]; zero for those beyond the experts."""
    import torch

    return (ids[..., None] == torch.arange(experts, device=ids.device)).long()


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return type(value) is type(default) and isinstance(value, _PLAIN) and bool(value == default)


PLAIN = Calling((Argument("hidden_states", "hidden_states"),))
