"""What a result file says of the machine it was made on."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from moe_surgery.installed.versions import versions


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else "unknown CPU"


def machine_name() -> str:
    """A short name for files, such as "epyc-2core"."""
    pattern = r"\(R\)|\(TM\)|@.*|\d+-core|\b(AMD|Intel|CPU|processor|with .*)\b"
    words = re.sub(pattern, " ", cpu_name(), flags=re.I).split()
    return "-".join([*words, f"{os.cpu_count()}core"]).lower()


def describe(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """Machine and versions, as the head of a result file; ``load_before`` is ``os.getloadavg()`` before measuring."""
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "loadavg_before": [round(load, 2) for load in load_before],
        "loadavg_after": [round(load, 2) for load in os.getloadavg()],
    }
    return {"machine": machine, "versions": {"python": sys.version.split()[0], **versions()}}
