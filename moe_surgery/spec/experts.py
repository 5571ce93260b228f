"""The MLPs of a block: those it routes tokens to, and the one that every token visits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "mish", "hardswish", "elu", "leaky_relu", "relu6", "tanh", "sigmoid"
]
"""What an MLP's gate goes through: ``elu`` with an α of 1, ``leaky_relu`` with a slope of 0.01."""


@dataclass(frozen=True)
class Mix:
    """What stands between the matrices of an MLP: ``act(gate) * up``, and what models add to it.

    ``gated`` is false where there is no up projection. ``limit`` clamps ``gate`` from above and ``up`` from both sides;
    with ``limit_after`` the activated gate is clamped instead of the gate. ``alpha`` is the factor inside a silu's
    sigmoid; ``offset`` is added to ``up``.
    """

    activation: Activation
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it is ``act(gate) * up`` and nothing more."""
        return self == Mix(self.activation)

    def __str__(self) -> str:
        text: str = self.activation
        text += f"(α {self.alpha:g})" if self.alpha != 1.0 else ""
        text += " ungated" if not self.gated else ""
        text += f", up + {self.offset:g}" if self.offset else ""
        if self.limit is not None:
            text += f" clamped at {self.limit:g}" + (" after" if self.limit_after else "")
        return text


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: ``num_experts`` MLPs of one width. ``biases`` says that every matrix has one.

    ``weights_on`` is where routing weights apply: to the experts' outputs or to their inputs. Ids from ``num_experts``
    up to ``num_experts + identities - 1`` are experts that return their input, and the ``empty`` ids after those add
    nothing: no expert of theirs is among the routed ones.
    """

    num_experts: int
    width: int
    activation: Activation
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0
    biases: bool = False
    weights_on: Literal["output", "input"] = "output"
    identities: int = 0
    empty: int = 0

    @property
    def nothing_of_zero(self) -> bool:
        """Whether every expert gives zero for a token that is zero."""
        return not self.biases and (self.gated or self.activation != "sigmoid")

    @property
    def acting(self) -> int:
        """How many ids stand for experts that add something."""
        return self.num_experts + self.identities

    @property
    def total(self) -> int:
        """How many experts a router chooses from."""
        return self.acting + self.empty

    @property
    def mix(self) -> Mix:
        return Mix(self.activation, self.gated, self.limit, self.limit_after, self.alpha, self.offset)


@dataclass(frozen=True)
class SharedSpec:
    """The shared expert: one MLP that every token visits, times ``gate`` and ``scale``."""

    width: int
    activation: Activation
    gate: Literal["sigmoid"] | None
    scale: float = 1.0
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0

    @property
    def mix(self) -> Mix:
        return Mix(self.activation, self.gated, self.limit, self.limit_after, self.alpha, self.offset)
