"""A place in a model's module tree where something looks like a sparse-MoE block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Site:
    """One candidate place in the module tree: a module that looks like a sparse-MoE block.

    One that isn't ``sure`` may be some other layer of that form; it is no site if it doesn't choose by any top-k.
    ``told`` says how its experts are chosen, where its code shows that nothing that it computes does.
    """

    path: str
    module: nn.Module
    sure: bool = True
    told: str | None = None

    @property
    def kind(self) -> str:
        """The class name of the block, for people; nothing is decided by it."""
        return type(self.module).__name__
