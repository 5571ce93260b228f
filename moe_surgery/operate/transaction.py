"""Putting new blocks into a model, all or none, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moe_surgery.errors import SurgeryError
from moe_surgery.interrupts import without_interrupts
from moe_surgery.operate.guards import Guards
from moe_surgery.targets.base import StandingBlock


@dataclass(eq=False)
class Swap:
    """One exchange: ``new`` stands where ``old`` stood. ``old`` is None where it was given up (not undoable)."""

    path: str
    parent: nn.Module
    name: str
    old: nn.Module | None
    new: StandingBlock

    @classmethod
    def at(cls, model: nn.Module, path: str, new: StandingBlock) -> Swap:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        return cls(path, parent, name, parent.get_submodule(name), new)

    def place(self, module: nn.Module) -> None:
        """Put ``module`` at the swap's place; a child that is there keeps its place among its siblings."""
        self.parent._modules[self.name] = module

    @property
    def kept_bytes(self) -> int:
        """Bytes of the old block that the new one doesn't share, which are held only so that undo can put it back."""
        if self.old is None:
            return 0
        storages = [parameter.untyped_storage() for parameter in self.old.parameters()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return max(sum(sizes.values()) - self.new.moved_bytes, 0)


class Transaction:
    """The swaps of one operation on ``model``. Until :meth:`commit` it is untouched; commit makes all or none."""

    def __init__(self, model: nn.Module, swaps: Sequence[Swap]) -> None:
        self.swaps = tuple(swaps)
        self.committed = False
        kept = all(swap.old is not None for swap in self.swaps)
        self._guards = Guards(model, [(swap.path, swap.new) for swap in self.swaps], kept)

    def commit(self) -> None:
        """Put every new block in place. Any exception, an interrupt included, leaves the old ones in place."""
        try:
            for swap in self.swaps:
                swap.place(swap.new)
                swap.new.keep_original(swap.old)
            self._guards.put()
            self.committed = True
        except BaseException:
            self._restore()
            self.committed = False
            raise

    def undo(self) -> None:
        """Put the old modules back: the same objects, with the same storages.

        Raises :class:`SurgeryError` if there is nothing to undo, if the originals were given up, or if somebody else
        has replaced a block since.
        """
        if not self.committed:
            raise SurgeryError("nothing to undo: these replacements are not in the model")
        if any(swap.old is None for swap in self.swaps):
            raise SurgeryError("can't undo: the originals were given up (undoable=False); load the model again")
        for swap in self.swaps:
            if swap.parent._modules.get(swap.name) is not swap.new:
                raise SurgeryError(f"can't undo: {swap.path} no longer holds the block that was put there")
        self._restore()
        self.committed = False

    def _restore(self) -> None:
        with without_interrupts():
            self._guards.remove()
            for swap in self.swaps:
                if swap.old is not None:
                    swap.new.hand_back_buffers(swap.old)
                    swap.place(swap.old)
                    swap.new.keep_original(None)
