"""The graphics cards that a model is on: what was found on one card needn't hold on another."""

from __future__ import annotations

import torch
from torch import nn


def cards(model: nn.Module) -> dict[str, str]:
    """``{"GPU": names}`` of the CUDA devices that hold ``model``'s parameters, each name once; empty if none does."""
    devices = dict.fromkeys(parameter.device for parameter in model.parameters() if parameter.device.type == "cuda")
    names = dict.fromkeys(torch.cuda.get_device_name(device) for device in devices)
    return {"GPU": ", ".join(names)} if names else {}
