"""A part of a block's own code, as the operations it was recorded as, to be run again on other batches.

Where a block routes in a way that no spec says, or returns or keeps more than its output, that part of it goes on being
computed as it was: by the very operations, with the block's own weights. Sizes that came of the batch are those of the
batch at hand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

ROUTING = ("weights", "ids")
"""The outputs of a router: routing weights and expert ids, [T, k] each."""


@dataclass(frozen=True)
class At:
    """An operand that is the result of step ``number``."""

    number: int


@dataclass(frozen=True)
class Many:
    """A number that came of the batch: ``times`` the number of its tokens, rows ("batch") or columns ("sequence")."""

    of: Literal["tokens", "batch", "sequence"]
    times: int = 1


@dataclass(frozen=True)
class Numbers:
    """A tensor of numbers that the code brings along, the same in every call."""

    values: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One operation: ``func`` of operands in which results of others are :class:`At`.

    ``func`` is an aten operation, ``operator.getitem``, or "input", "weight" (of the name that is its only operand) or
    "numbers".
    """

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Program:
    """Steps in order, and which of them give what is wanted, by name.

    ``flat``: the input is [T, H], else [B, S, H]. ``logits`` is the step of a router's last linear map to experts.
    ``of_tokens`` is what the block does with an input [T, H], where it takes both.
    """

    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]
    flat: bool
    logits: int | None = None
    of_tokens: Program | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the block's weights that it takes, each once."""
        return tuple(dict.fromkeys(step.args[0] for step in self.steps if step.func == "weight"))

    def run(
        self, x: Tensor, weights: Mapping[str, Tensor], shaken: Callable[[Tensor], Tensor] = lambda logits: logits
    ) -> dict[str, Tensor]:
        """What comes of ``x`` [B, S, H], or [T, H], by name. ``shaken`` changes the router's logits on the way."""
        if self.of_tokens is not None and x.ndim == 2:
            return self.of_tokens.run(x, weights, shaken)
        if self.flat:
            x = x.reshape(-1, x.shape[-1])
        elif x.ndim != 3:
            x = x.reshape(1, -1, x.shape[-1])
        x = x.contiguous()  # as it was recorded
        sizes = {"tokens": x.shape[:-1].numel(), "batch": x.shape[0], "sequence": x.shape[-2]}
        values: list[Any] = []

        def filled(operand: Any) -> Any:
            if isinstance(operand, At):
                return values[operand.number]
            if isinstance(operand, Many):
                return sizes[operand.of] * operand.times
            return [filled(item) for item in operand] if isinstance(operand, tuple) else operand

        for number, step in enumerate(self.steps):
            if step.func == "input":
                value: Any = x
            elif step.func == "weight":
                value = weights[step.args[0]]
            elif step.func == "numbers":
                value = torch.tensor(step.args[0].values, dtype=step.args[0].dtype, device=x.device)
            else:
                args, kwargs = [filled(arg) for arg in step.args], {name: filled(arg) for name, arg in step.kwargs}
                if "device" in kwargs:
                    kwargs["device"] = x.device
                if step.func is not operator.getitem and step.func._schema.is_mutable:
                    args[0] = args[0].clone()  # a record has every value under its own name
                value = step.func(*args, **kwargs)
            values.append(shaken(value) if number == self.logits else value)
        return {name: values[number] for name, number in self.outputs}

    def only(self, *names: str) -> Program:
        """The same for some of its outputs."""
        kept = tuple((name, number) for name, number in self.outputs if name in names)
        other = None if self.of_tokens is None else self.of_tokens.only(*names)
        return replace(self, outputs=kept, of_tokens=other)


class Replay(nn.Module):
    """A program with the weights that it takes, by reference."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.program = program
        self._held = {name: f"weight_{number}" for number, name in enumerate(program.weights)}
        for name, own in self._held.items():
            self.register_parameter(own, nn.Parameter(weights[name], requires_grad=False))
        self.eval()

    def forward(self, x: Tensor, shaken: Callable[[Tensor], Tensor] = lambda logits: logits) -> dict[str, Tensor]:
        """See :meth:`Program.run`."""
        return self.program.run(x, {name: getattr(self, own) for name, own in self._held.items()}, shaken)
