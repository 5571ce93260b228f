"""A part of a block's own code, as the operations it was recorded as, to be run again on other batches.

Where a block routes in a way that no spec says, or returns or keeps more than its output, that part of it goes on being
computed as it was: by the very operations, with the block's own weights. Sizes that came of the batch are those of the
batch at hand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_surgery.companion import Companion, made_up
from moe_surgery.form import Form

ROUTING = ("weights", "ids")
"""The outputs of a router: routing weights and expert ids, [T, k] each."""
ENTERING = "entering"
"""What the routed experts are given [..., H'], where that isn't the block's input; H' may be another size than H."""


@dataclass(frozen=True)
class At:
    """An operand that is the result of step ``number``."""

    number: int


@dataclass(frozen=True)
class Many:
    """A number that came of the batch: ``times`` the number of its tokens, rows ("batch") or columns ("sequence").

    Of places in several dimensions it may be the number of those in one of them ("side 0").
    With a ``power`` of -1 it is ``times`` divided by that, with one of 2 or -2 that is squared; ``plus`` is added to
    it. ``was`` is what it was in the record that it was found in.
    """

    of: Literal["tokens", "batch", "sequence", "side 0", "side 1", "side 2"]
    times: float = 1
    was: float = field(default=0, compare=False)
    power: int = 1
    plus: float = 0.0

    def made(self, size: int) -> float:
        """The number, of a batch of that ``size``."""
        by = size ** abs(self.power)
        made = self.times * by if self.power > 0 else self.times / by
        return made + self.plus if self.plus else made


@dataclass(frozen=True)
class Numbers:
    """A tensor of numbers that the code brings along, the same in every call."""

    values: Any
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        """The tensor, on ``device``."""
        return torch.tensor(self.values, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Step:
    """One operation: ``func`` of operands in which results of others are :class:`At`.

    ``func`` is an aten operation, ``operator.getitem``, or "input", "weight" (of the name that is its only operand),
    "numbers", "beside" (the tensor that is given beside the input, of the key that is its only operand), or "routed"
    (what the routed experts came to, of a shape and dtype).
    """

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def moved(self, after: int, by: int) -> Step:
        """The same where results of steps later than ``after`` are those of steps ``by`` later."""

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, tuple):
                return tuple(map(operand, leaf))
            return At(leaf.number + by) if isinstance(leaf, At) and leaf.number > after else leaf

        return replace(self, args=operand(self.args), kwargs=operand(self.kwargs))


@dataclass(frozen=True)
class Program:
    """Steps in order, and which of them give what is wanted, by name.

    ``flat``: the input is [T, H], else [B, S, H]. ``logits`` is the step of a router's last linear map to experts.
    ``of_tokens`` is what the block does with an input [T, H], where it takes both. ``whole`` is the step that gives the
    block's output, where that is more than its routed experts; it comes of a step "routed", after all ``outputs``.
    ``companions`` are the tensors that it takes beside its input. The block takes its tokens in a ``form``, where that
    isn't [B, S, H], into which the first steps bring them.
    """

    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]
    flat: bool
    logits: int | None = None
    of_tokens: Program | None = None
    whole: int | None = None
    companions: tuple[Companion, ...] = ()
    form: Form | None = None

    @property
    def numbers(self) -> tuple[Numbers, ...]:
        """The tensors of numbers that it brings along, each once."""
        others = self.of_tokens.numbers if self.of_tokens is not None else ()
        return tuple(dict.fromkeys([*(step.args[0] for step in self.steps if step.func == "numbers"), *others]))

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the block's weights that it takes, each once."""
        return tuple(dict.fromkeys(step.args[0] for step in self.steps if step.func == "weight"))

    def begin(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        shaken: Callable[[Tensor], Tensor] = lambda logits: logits,
        numbers: Mapping[Numbers, Tensor] = MappingProxyType({}),
        dtype: torch.dtype | None = None,
        beside: Mapping[str, Tensor] = MappingProxyType({}),
        sides: tuple[int, ...] | None = None,
    ) -> Begun:
        """A run with ``x`` [B, S, H], or [T, H], as far as it goes without the routed experts.

        ``shaken`` changes the router's logits on the way. ``numbers`` are tensors that are at hand already. With a
        ``dtype`` everything is computed in it that is computed in any floating-point dtype. What isn't among the
        tensors ``beside`` the input is made up of it, and so are the ``sides`` of the input in the block's form.
        """
        if self.of_tokens is not None and x.ndim == 2:
            return self.of_tokens.begin(x, weights, shaken, numbers, dtype, beside)
        found = made_up(self.companions, x, beside)
        if self.flat:
            x = x.reshape(-1, x.shape[-1])
        elif x.ndim != 3:
            x = x.reshape(1, -1, x.shape[-1])
        found = {c.key: found[c.key].reshape(c.shape(tuple(x.shape))).contiguous() for c in self.companions}
        if sides is None:
            sides = () if self.form is None else self.form.sides(x.shape[-2])
        run = Begun(self, x.contiguous(), weights, shaken, numbers, dtype, found, sides)  # as it was recorded
        return run.on(next((n for n, step in enumerate(self.steps) if step.func == "routed"), len(self.steps)))

    def run(
        self, x: Tensor, weights: Mapping[str, Tensor], shaken: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> dict[str, Tensor]:
        """What comes of ``x`` [B, S, H], or [T, H], by name, without the routed experts; see :meth:`begin`."""
        return self.begin(x, weights, shaken).outputs

    def renumbered(self, numbers: tuple[int, ...]) -> Program:
        """The same with expert ``e`` called ``numbers[e]`` among the ids that it gives."""
        ids = dict(self.outputs)["ids"]
        steps, table = list(self.steps[: ids + 1]), Numbers(numbers, torch.int64)
        steps += [Step("numbers", (table,)), Step(torch.ops.aten.index.Tensor, (At(ids + 1), (At(ids),)))]
        steps += [step.moved(ids, 2) for step in self.steps[ids + 1 :]]

        def moved(number: int) -> int:
            return number + 2 * (number > ids)

        return replace(
            self,
            steps=tuple(steps),
            outputs=tuple((name, ids + 2 if name == "ids" else moved(number)) for name, number in self.outputs),
            logits=None if self.logits is None else moved(self.logits),
            whole=None if self.whole is None else moved(self.whole),
            of_tokens=None if self.of_tokens is None else self.of_tokens.renumbered(numbers),
        )

    def with_one_more(self, expert: int) -> Program:
        """The same with one more choice for every token: of ``expert``, its weight the sum of the others'."""
        found = dict(self.outputs)
        last, aten = max(found["ids"], found["weights"]), torch.ops.aten
        ids, weights, new = At(found["ids"]), At(found["weights"]), last + 1
        more = (
            Step(aten.slice.Tensor, (ids, -1, 0, 1)),
            Step(aten.full_like.default, (At(new), expert)),
            Step(aten.cat.default, ((ids, At(new + 1)), -1)),
            Step(aten.sum.dim_IntList, (weights, (-1,), True)),
            Step(aten.cat.default, ((weights, At(new + 3)), -1)),
        )
        places = {"ids": new + 2, "weights": new + 4}

        def moved(number: int) -> int:
            return number + len(more) * (number > last)

        return replace(
            self,
            steps=(*self.steps[:new], *more, *(step.moved(last, len(more)) for step in self.steps[new:])),
            outputs=tuple((name, places.get(name, moved(number))) for name, number in self.outputs),
            logits=None if self.logits is None else moved(self.logits),
            whole=None if self.whole is None else moved(self.whole),
            of_tokens=None if self.of_tokens is None else self.of_tokens.with_one_more(expert),
        )

    def only(self, *names: str) -> Program:
        """The same for some of its outputs."""
        kept = tuple((name, number) for name, number in self.outputs if name in names)
        other = None if self.of_tokens is None else self.of_tokens.only(*names)
        return replace(self, outputs=kept, of_tokens=other)


@dataclass(frozen=True, eq=False)
class Begun:
    """A run of ``program`` with the input ``x``, as far as it got; see :meth:`Program.begin`."""

    program: Program
    x: Tensor
    weights: Mapping[str, Tensor]
    shaken: Callable[[Tensor], Tensor]
    numbers: Mapping[Numbers, Tensor]
    dtype: torch.dtype | None
    beside: Mapping[str, Tensor]
    sides: tuple[int, ...]
    values: tuple[Any, ...] = ()

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self.values[number] for name, number in self.program.outputs}

    def finished(self, routed: Tensor) -> Tensor:
        """The block's output [..., H], of ``routed`` [..., H']."""
        assert self.program.whole is not None
        out: Tensor = self.on(len(self.program.steps), routed).values[self.program.whole]
        return out.reshape(*routed.shape[:-1], out.shape[-1])

    def on(self, until: int, routed: Tensor | None = None) -> Begun:
        """The same after the steps before ``until``."""
        values = list(self.values)
        for number in range(len(values), until):
            value = self._value(self.program.steps[number], values, routed)
            values.append(self.shaken(value) if number == self.program.logits else value)
        return replace(self, values=tuple(values))

    def _value(self, step: Step, values: list[Any], routed: Tensor | None) -> Any:
        if step.func == "input":
            return self._kept(self.x)
        if step.func == "beside":
            return self._kept(self.beside[step.args[0]])
        if step.func == "weight":
            return self._kept(self.weights[step.args[0]])
        if step.func == "numbers":
            given = self.numbers.get(step.args[0])
            return self._kept(step.args[0].made(self.x.device) if given is None else given)
        args, kwargs = self._filled(step.args, values), self._filled(dict(step.kwargs), values)
        if step.func == "routed":
            assert routed is not None
            return routed.reshape(args[0]).to(args[1])
        if "device" in kwargs:
            kwargs["device"] = self.x.device
        if step.func is not operator.getitem and step.func._schema.is_mutable:
            args[0] = args[0].clone()  # a record has every value under its own name
        return step.func(*args, **kwargs)

    def _filled(self, operand: Any, values: list[Any]) -> Any:
        if isinstance(operand, At):
            return values[operand.number]
        if isinstance(operand, Many):
            sizes = {"tokens": self.x.shape[:-1].numel(), "batch": self.x.shape[0], "sequence": self.x.shape[-2]}
            sizes |= {f"side {number}": size for number, size in enumerate(self.sides)}
            return operand.made(sizes[operand.of])
        if isinstance(operand, dict):
            return {name: self._filled(item, values) for name, item in operand.items()}
        if isinstance(operand, torch.dtype) and operand.is_floating_point:
            return self.dtype or operand
        return [self._filled(item, values) for item in operand] if isinstance(operand, tuple) else operand

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype that everything is to be computed in."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor


class Replay(nn.Module):
    """A program with the weights that it takes, by reference.

    Those in ``state`` change between calls: they are looked up there in each.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, Tensor], state: Mapping[str, Tensor | None] | None = None
    ) -> None:
        super().__init__()
        self.program = program
        self._state = {} if state is None else state
        fixed = [name for name in program.weights if name not in self._state]
        self._held = {name: f"weight_{number}" for number, name in enumerate(fixed)}
        for name, own in self._held.items():
            self.register_parameter(own, nn.Parameter(weights[name], requires_grad=False))
        # Not made anew in every call: a CUDA graph can't hold a copy from the host.
        self._numbers = {numbers: f"numbers_{place}" for place, numbers in enumerate(program.numbers)}
        device = next((weight.device for weight in self.parameters()), torch.device("cpu"))
        for numbers, own in self._numbers.items():
            self.register_buffer(own, numbers.made(device), persistent=False)
        self.eval()

    def forward(
        self, x: Tensor, beside: Mapping[str, Tensor] = MappingProxyType({}), sides: tuple[int, ...] | None = None
    ) -> Begun:
        """See :meth:`Program.begin`."""
        weights = {name: getattr(self, own) for name, own in self._held.items()}
        weights |= {name: tensor for name, tensor in self._state.items() if tensor is not None}
        numbers = {key: getattr(self, own) for key, own in self._numbers.items()}
        return self.program.begin(x, weights, numbers=numbers, beside=beside, sides=sides)
