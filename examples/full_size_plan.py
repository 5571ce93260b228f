"""Plan the surgery of the full Qwen3-Omni-30B-A3B from its config alone: no weights, no GPU.

    python examples/full_size_plan.py

The config is the published one (see qwen3_omni_config.py); the model is built on the meta device, which takes no memory
for its 35 billion parameters.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from qwen3_omni_config import FULL, omni_config
from rich.console import Console

import moe_surgery


def main() -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "Qwen3-Omni-30B-A3B"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(omni_config(FULL)), encoding="utf-8")
        plan = moe_surgery.plan(model)
    plan.report().but(seconds=time.perf_counter() - started).render(Console())


if __name__ == "__main__":
    main()
