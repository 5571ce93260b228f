"""The dtypes that weights are kept in, and the devices that they are on, by the names that people give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    import torch


def torch_dtype(name: object) -> torch.dtype:
    """The dtype of a name such as "bfloat16". Raises :class:`UsageError` if weights can't be in it."""
    import torch

    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"{name!r} is not a floating-point dtype of torch")
    if torch.finfo(dtype).bits < 16:
        raise UsageError(f"{name!r} is a dtype that weights are kept in with scales; no model computes in it")
    return dtype


def dtype_name(name: object) -> str:
    """What reports call a dtype, such as "float16" for "torch.half". Raises :class:`UsageError` if it is none."""
    return str(torch_dtype(name)).removeprefix("torch.")


def device_type(name: object) -> str:
    """The type of a device, which needn't be on this machine. Raises :class:`UsageError` if no model can be on it."""
    import torch

    try:
        kind = torch.device(name).type if isinstance(name, str) else None
    except RuntimeError:
        kind = None
    if kind is None:
        raise UsageError(f"{name!r} is no device of torch, such as cpu or cuda")
    if kind == "meta":
        raise UsageError("device 'meta' holds no weights")
    return kind


def here(name: str) -> torch.device:
    """The device, which must be on this machine. Raises :class:`UsageError` if it isn't."""
    import torch

    device_type(name)
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from None
