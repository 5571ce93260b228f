"""Launches every kernel once on small blocks: what ``test_gpu_sanitizer.py`` has compute-sanitizer look at."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from folded_blocks import ROUTED, SPEC  # noqa: E402
from spec_weights import weights  # noqa: E402

from moe_surgery.targets.folded.target import FoldedTarget  # noqa: E402


def main() -> None:
    launched = set()
    for spec in (SPEC, *ROUTED.values()):
        block = FoldedTarget().build(spec, weights(spec, torch.bfloat16, device="cuda"), prefix="mlp")
        for tokens in (1, 3, 150):
            x = torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                assert bool(block(x).isfinite().all())
            launched.add(tokens)
    print(f"{len(ROUTED) + 1} blocks, of {sorted(launched)} tokens")


if __name__ == "__main__":
    main()
