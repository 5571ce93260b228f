"""Where each weight of a block lies: which parameter, which expert's slice of it, which rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A matrix inside a parameter of the block: ``parameter[index][rows[0]:rows[1]]``, then transposed if it says so.

    ``path`` is relative to the block. ``index`` is None for a parameter that is itself a matrix. The matrix that a
    piece yields always maps inputs to outputs as ``torch.nn.Linear`` does: ``[out, in]``.
    """

    path: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def __str__(self) -> str:
        text = self.path + (f"[{self.index}]" if self.index is not None else "")
        text += f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else ""
        return text + (".T" if self.transposed else "")


@dataclass(frozen=True)
class MLPPieces:
    """The three matrices of a gated MLP: ``down(act(gate(x)) * up(x))``."""

    gate: Piece
    up: Piece
    down: Piece


@dataclass(frozen=True)
class Layout:
    """All weights of a block, by role. ``experts[e]`` is routed expert ``e``."""

    router: Piece
    experts: tuple[MLPPieces, ...]
    shared: MLPPieces | None = None
    shared_gate: Piece | None = None

    @property
    def packed(self) -> tuple[str, str] | None:
        """``(gate_up, down)`` parameter paths if the experts are two stacked tensors in the target's own order.

        That order is ``[E, 2I, H]`` with gate before up, and ``[E, H, I]``; such tensors are moved by reference.
        """
        first = self.experts[0]
        if first.gate.rows is None or first.up.rows is None or first.gate.path != first.up.path:
            return None
        width = first.gate.rows[1]
        for number, expert in enumerate(self.experts):
            wanted = MLPPieces(
                Piece(first.gate.path, number, (0, width)),
                Piece(first.gate.path, number, (width, 2 * width)),
                Piece(first.down.path, number),
            )
            if expert != wanted:
                return None
        return first.gate.path, first.down.path

    def paths(self) -> frozenset[str]:
        """Every parameter this layout reads, relative to the block."""
        pieces = [self.router]
        for mlp in (*self.experts, *([self.shared] if self.shared else [])):
            pieces += [mlp.gate, mlp.up, mlp.down]
        if self.shared_gate is not None:
            pieces.append(self.shared_gate)
        return frozenset(piece.path for piece in pieces)
