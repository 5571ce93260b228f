"""The tensors of a block whose original was given up, as ``state_dict`` names them: there, but not to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from moe_surgery.errors import SurgeryError

# What may be asked of one: nothing that needs its elements.
_KNOWN = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim", "grad", "is_meta", "is_cuda")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point}


class GivenUp(Tensor):
    """A tensor of known name, shape and dtype whose elements nobody has any more."""

    _path: str

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> Self:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        vars(tensor)["_path"] = name
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KNOWN:
            _refuse(next((leaf for leaf in args if isinstance(leaf, GivenUp)), None))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GivenUp({vars(self)['_path']})"


def _refuse(tensor: GivenUp | None) -> NoReturn:
    name = "a tensor" if tensor is None else vars(tensor)["_path"]
    raise SurgeryError(
        f"{name} can't be saved or read: the originals of the swapped MoE blocks were given up (undoable=False); load "
        "the model again"
    )
