"""Waiting for a device, so that what a kernel failed with is told of the call that started it."""

from __future__ import annotations

import torch

from moe_surgery.errors import DeviceError


def settle(device: torch.device) -> None:
    """Return once all that was asked of ``device`` is done.

    Raises what a kernel failed with, once: afterwards the device can be used again. Where it can't, which is so after
    an access to memory that isn't there, that is a :class:`~moe_surgery.errors.DeviceError`.
    """
    if device.type in ("cpu", "meta"):
        return
    try:
        _use(device)
    except RuntimeError as error:
        try:
            _use(device)
        except RuntimeError:
            line = str(error).strip().splitlines()[0]
            raise DeviceError(f"{device} failed and can't be used any more in this process: {line}") from error
        raise


def _use(device: torch.device) -> None:
    # A kernel that could not be launched is reported by the next launch only, one that went astray by waiting.
    torch.empty(1, device=device).fill_(1.0)
    torch.accelerator.synchronize(device)
