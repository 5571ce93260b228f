"""What the kernels compute and over which tensors: the spec's numbers, and the folded weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns of e4m3 weights that have a scale in common, and columns of the activations that meet them.

Other weights have one for each row, and then each token has one.
"""

WIDE_ROWS = 256
"""Up to this many tokens, an expert's output is kept in float32 until it is added to the others'."""

SCHEMA = (
    "folded_moe(Tensor x, Tensor router, Tensor w13, Tensor w2, Tensor? gate, Tensor? shared_gate, Tensor? shared_up, "
    "Tensor? shared_down, Tensor[] scales, int top_k, str activation, bool sigmoid, bool renormalize, float scale, "
    "float shared_scale, bool native, bool by_sigmoid) -> Tensor"
)
"""The operator, as torch knows it; graphs that were compiled with another one can't be used."""

ROUTED_SCHEMA = (
    "routed_moe(Tensor x, Tensor ids, Tensor weights, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor? shared_gate, Tensor? shared_up, Tensor? shared_down, Tensor[] scales, str activation, bool up, "
    "float limit, bool limit_after, float alpha, float offset, bool on_input) -> Tensor"
)
"""The one for experts that were chosen outside of the kernels."""

ROUTE_SCHEMA = (
    "route(Tensor x, Tensor router, Tensor? bias, Tensor? correction, Tensor? gate, int top_k, int slices, "
    "str scoring, bool by_logits, bool native, float soft_cap, int groups, int chosen, bool top2, bool lowest, "
    "bool renormalize, float epsilon, float floor, bool squares, float scale, float shared_scale) -> (Tensor, Tensor)"
)
"""The one that chooses experts where that needs more than their logits."""


@dataclass(frozen=True)
class RouterTerms:
    """One router in numbers; the fields are those of :class:`~moe_surgery.spec.RouterSpec`.

    A ``soft_cap`` or ``floor`` of 0 is none. Only experts in the ``chosen`` best of ``groups`` may be chosen; a group
    is judged by its ``top2`` experts or its best one, and experts of others rank as minus infinity if ``lowest``, else
    as zero. Weights are renormalised by their sum, or by the root of the sum of their ``squares``.
    """

    experts: int
    top_k: int
    slices: int
    hidden: int
    scoring: str
    by_logits: bool
    native: bool
    soft_cap: float
    groups: int
    chosen: int
    top2: bool
    lowest: bool
    renormalize: bool
    epsilon: float
    floor: float
    squares: bool
    scale: float
    shared_scale: float
    biased: bool
    corrected: bool
    gated: bool

    @property
    def rows(self) -> int:
        """Logits of a token: one for each expert, one for the shared expert's gate if it has one."""
        return self.experts + (1 if self.gated else 0)


@dataclass(frozen=True)
class Terms:
    """One block in numbers. ``slices`` experts of the routed width stand for the shared expert, 0 if there is none.

    ``native`` logits are rounded to the input's dtype before experts are ranked, as the spec's routers do. Experts are
    ranked ``by_sigmoid``, which saturates, where the block ranks its sigmoid scores, else by logits.

    Where experts and their weights are ``given``, nothing is routed here. ``up`` to ``offset`` are the fields of
    :class:`~moe_surgery.spec.Mix` (a ``limit`` of 0 is none). Routing weights ``on_input`` are those of inputs.
    ``biases`` are the routed experts'; a shared expert has none. ``scaled`` experts, the shared one too, are in e4m3
    with a scale for each block of :data:`BLOCK`, or ``by_row``; activations are rounded to it on their way to them.
    Few tokens alone are computed with scales by row.
    """

    experts: int
    top_k: int
    slices: int
    hidden: int
    width: int
    activation: str
    sigmoid: bool = False
    renormalize: bool = False
    scale: float = 1.0
    shared_scale: float = 1.0
    gated: bool = False
    native: bool = False
    by_sigmoid: bool = False
    given: bool = False
    up: bool = True
    limit: float = 0.0
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0
    on_input: bool = False
    biases: bool = False
    scaled: bool = False
    by_row: bool = False

    @property
    def pairs(self) -> int:
        """Experts that each token visits, the shared expert's slices included."""
        return self.top_k + self.slices

    @property
    def rows(self) -> int:
        """Rows of the router's weight: one for each expert, one for the shared expert's gate if it has one."""
        return self.experts + (1 if self.gated else 0)

    def rows_dtype(self, tokens: int, dtype: torch.dtype) -> torch.dtype:
        """What experts' outputs are kept in: float32 where that costs next to nothing, else the block's dtype."""
        return torch.float32 if tokens <= WIDE_ROWS else dtype


class Scales(NamedTuple):
    """What e4m3 weights are multiplied by: of an [N, K] matrix [N / BLOCK, K / BLOCK] or [N, 1], float32, contiguous.

    ``shared_up`` is None where the up projection's scales follow those of the gate projection.
    """

    w13: Tensor
    w2: Tensor
    shared_gate: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None


def by_row(weight: Tensor, scale: Tensor) -> bool:
    """Whether a ``scale`` of e4m3 weights [..., N, K] is one of each row."""
    return scale.shape[-2:] == (weight.shape[-2], 1)


@dataclass(frozen=True, eq=False)
class Weights:
    """A block's weights as they lie in its model, all contiguous, of one dtype on one device.

    Experts, the shared one among them, may be in e4m3 with ``scales``; router and gate are in the block's dtype.

    ``router`` [E, H]; ``w13`` [E, 2I, H] and ``w2`` [E, H, I] of the routed experts; of the shared expert, None where
    there is none, ``gate`` [1, H], ``shared_gate`` [M*I, H], ``shared_up`` alike and ``shared_down`` [H, M*I]. Without
    ``shared_up`` the up projection's rows follow those of the gate projection: ``shared_gate`` is [2*M*I, H] then.
    Without up projections ``w13`` is [E, I, H]. ``w13_bias`` [E, 2I] and ``w2_bias`` [E, H] are of the routed experts.
    """

    router: Tensor
    w13: Tensor
    w2: Tensor
    gate: Tensor | None = None
    shared_gate: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    scales: Scales | None = None

    def offsets(self) -> Offsets:
        """How the kernels find the shared expert's weights; nothing is copied."""
        gate = 0 if self.gate is None else _apart(self.gate, self.router)
        if self.shared_gate is None or self.shared_down is None:
            return Offsets(gate, 0, 0, 0)
        up = self.shared_gate.numel() // 2 if self.shared_up is None else _apart(self.shared_up, self.shared_gate)
        weights = gate, _apart(self.shared_gate, self.w13), up, _apart(self.shared_down, self.w2)
        s = self.scales
        if s is None or s.shared_gate is None or s.shared_down is None:
            return Offsets(*weights)
        up = s.shared_gate.numel() // 2 if s.shared_up is None else _apart(s.shared_up, s.shared_gate)
        return Offsets(*weights, _apart(s.shared_gate, s.w13), up, _apart(s.shared_down, s.w2))


class Routed(NamedTuple):
    """What was chosen outside: expert ``ids`` [T, K] int32, less than 0 for none, and ``weights`` [T, K + M] float32.

    The last M weights are those of the shared expert's slices, all alike. Both are contiguous.
    """

    ids: Tensor
    weights: Tensor


class Offsets(NamedTuple):
    """Distances in elements: of the shared expert's ``gate`` from the router, of its gate projection from ``w13``, of
    its up projection from that one, and of its down projection from ``w2``; and of the scales of the last three."""

    gate: int
    w13: int
    up: int
    w2: int
    scales_w13: int = 0
    scales_up: int = 0
    scales_w2: int = 0


def stand_ins(terms: Terms, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of the shapes, dtypes and alignment that ``terms`` are for, to compile with; they take no memory."""
    experts, slices, hidden, width = terms.experts, terms.slices, terms.hidden, terms.width
    rows13 = (2 if terms.up else 1) * width

    def of(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty([1] * len(shape), device=device, dtype=dtype).expand(shape)

    def expert(*shape: int) -> Tensor:
        return of(*shape, dtype=torch.float8_e4m3fn if terms.scaled else dtype)

    factors = torch.empty(1, device=device, dtype=torch.float32)
    return Weights(
        of(experts, hidden),
        expert(experts, rows13, hidden),
        expert(experts, hidden, width),
        of(1, hidden) if terms.gated else None,
        expert(rows13 // width * slices * width, hidden) if slices else None,
        None,
        expert(hidden, slices * width) if slices else None,
        of(experts, rows13) if terms.biases else None,
        of(experts, hidden) if terms.biases else None,
        Scales(factors, factors) if terms.scaled else None,
    )


def next_power(size: int) -> int:
    """The least power of two that isn't below ``size``."""
    return 1 << (size - 1).bit_length()


def tiles_for(size: int, tile: int) -> int:
    """How many tiles cover ``size``. Triton has a function for that, which takes the host as long as a launch."""
    return -(-size // tile)


def _apart(tensor: Tensor, other: Tensor) -> int:
    """How many elements ``tensor`` lies behind ``other``."""
    return (tensor.data_ptr() - other.data_ptr()) // tensor.element_size()
