"""Whether weights are still what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

_VERSION = attrgetter("_version")


@dataclass(frozen=True, eq=False)
class Unchanged:
    """Tensors by name, and how often each had been changed in place.

    torch counts what an optimizer, ``mul_`` or ``copy_`` changes. It doesn't count changes through ``.data``, through
    memory that is shared with arrays or other processes, or of tensors that were made in inference mode.
    """

    tensors: dict[str, Tensor]
    versions: list[int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Unchanged:
        """``tensors`` as they are now."""
        counted = {name: tensor for name, tensor in tensors.items() if not tensor.is_inference()}
        return cls(counted, list(map(_VERSION, counted.values())))

    def broken(self) -> str | None:
        """The name of the first tensor that was changed since."""
        now = list(map(_VERSION, self.tensors.values()))
        if now == self.versions:
            return None
        return next(name for name, then, here in zip(self.tensors, self.versions, now, strict=True) if then != here)
