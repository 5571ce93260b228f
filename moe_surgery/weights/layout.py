"""Where each weight of a block lies: which parameter, which expert's slice of it, which rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Piece:
    """A matrix inside a parameter of the block: ``parameter[index][rows[0]:rows[1]]``, then transposed if it says so.

    ``path`` is relative to the block. ``index`` is None for a parameter that is itself a matrix, as that of a
    convolution over one place [out, in, 1] is; of one that has more than three dimensions it counts the matrices. The
    matrix that a piece yields always maps inputs to outputs as ``torch.nn.Linear`` does: ``[out, in]``. Of its outputs
    only ``out = (start, stop, step)`` are meant, where given: a band of a transposed parameter, or every other row.

    ``cols = (start, stop, all)`` says that only some of the matrix's ``all`` inputs are meant: those of one expert,
    where the down projections of all lie side by side.

    A bias is a piece too: of a parameter that is a vector, or row ``index`` of one that is a matrix.
    """

    path: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    out: tuple[int, int, int] | None = None
    cols: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = self.path + (f"[{self.index}]" if self.index is not None else "")
        text += f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else ""
        text += ".T" if self.transposed else ""
        text += f"[:, {self.cols[0]}:{self.cols[1]}]" if self.cols else ""
        return text + (f"[{self.out[0]}:{self.out[1]}:{self.out[2]}]" if self.out else "")

    def inputs(self, start: int, stop: int, total: int) -> Piece:
        """Inputs ``start:stop`` of this piece, which has ``total``."""
        if self.transposed and self.out is None and self.cols is None:
            first = self.rows[0] if self.rows else 0
            return replace(self, rows=(first + start, first + stop))
        first, _, total = self.cols or (0, 0, total)
        return replace(self, cols=(first + start, first + stop, total))

    def outputs(self, start: int, stop: int, step: int = 1) -> Piece:
        """Outputs ``start:stop:step`` of this piece."""
        if step == 1 and self.out is None and not self.transposed:
            first = self.rows[0] if self.rows else 0
            return replace(self, rows=(first + start, first + stop))
        first, _, stride = self.out or (0, 0, 1)
        count = len(range(start, stop, step))
        begin = first + start * stride
        return replace(self, out=(begin, begin + (count - 1) * stride * step + 1, stride * step))


def over_one_place(shape: Sequence[int]) -> bool:
    """Whether a parameter of that ``shape`` is a matrix: it has two dimensions, and others of one at most."""
    return len(shape) >= 2 and all(size == 1 for size in shape[2:])


@dataclass(frozen=True)
class MLPPieces:
    """The matrices of an MLP: ``down(act(gate(x)) * up(x))``, with their biases where it has them.

    An MLP without an up projection, ``down(act(gate(x)))``, has ``up`` equal to ``gate``.
    """

    gate: Piece
    up: Piece
    down: Piece
    gate_bias: Piece | None = None
    up_bias: Piece | None = None
    down_bias: Piece | None = None

    def pieces(self) -> Iterator[Piece]:
        """Every piece once."""
        yield self.gate
        yield from (self.up,) if self.up != self.gate else ()
        yield self.down
        yield from (piece for piece in self.biases() if piece is not None)

    def biases(self) -> tuple[Piece | None, Piece | None, Piece | None]:
        """Those of gate, up and down projection; one that is missing where others are there is zero."""
        return self.gate_bias, self.up_bias, self.down_bias


@dataclass(frozen=True)
class Layout:
    """All weights of a block, by role. ``experts[e]`` is routed expert ``e``.

    ``router.path`` is empty where only the experts' module was read.
    """

    router: Piece
    experts: tuple[MLPPieces, ...]
    shared: MLPPieces | None = None
    shared_gate: Piece | None = None
    router_bias: Piece | None = None
    correction_bias: Piece | None = None
    output_bias: Piece | None = None

    @cached_property
    def packed(self) -> tuple[str, str] | None:
        """``(gate_up, down)`` parameter paths if the experts are two stacked tensors in the target's own order.

        That order is ``[E, 2I, H]`` with gate before up (``[E, I, H]`` without an up projection), and ``[E, H, I]``;
        such tensors are moved by reference.
        """
        first = self.experts[0]
        for number, expert in enumerate(self.experts):
            gate = up = Piece(first.gate.path, number)
            if first.up != first.gate:
                if first.gate.rows is None:
                    return None
                width = first.gate.rows[1]
                gate, up = replace(gate, rows=(0, width)), replace(gate, rows=(width, 2 * width))
            if (expert.gate, expert.up, expert.down) != (gate, up, Piece(first.down.path, number)):
                return None
        return first.gate.path, first.down.path

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every role."""
        yield from (self.router,) if self.router.path else ()
        for mlp in (*self.experts, *((self.shared,) if self.shared else ())):
            yield from mlp.pieces()
        alone = (self.shared_gate, self.router_bias, self.correction_bias, self.output_bias)
        yield from (piece for piece in alone if piece is not None)

    def paths(self) -> frozenset[str]:
        """Every parameter this layout reads, relative to the block."""
        return frozenset(piece.path for piece in self.pieces())
