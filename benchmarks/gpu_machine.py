"""What a result file says of the GPU it was made on."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from typing import Any

import torch

from moe_surgery.installed.versions import versions


def machine_name() -> str:
    """A short name for files, such as "h100"."""
    found = re.search(r"\b[A-Z]{1,3}\d{2,4}\b", torch.cuda.get_device_name())
    return (found[0] if found else torch.cuda.get_device_name().replace(" ", "-")).lower()


def describe() -> dict[str, Any]:
    """Machine and versions, as the head of a result file."""
    properties = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    found = {"python": sys.version.split()[0], **versions()}
    if find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    return {"machine": machine, "versions": found}
