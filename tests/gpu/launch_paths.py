"""Launches every kernel once on small blocks: what ``test_gpu_sanitizer.py`` has compute-sanitizer look at."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from folded_blocks import ROUTED, SPEC  # noqa: E402
from spec_weights import weights  # noqa: E402
from stored_blocks import BLOCKS, GATED, ROWS, held, stored_weights  # noqa: E402

from moe_surgery.kernels.arguments import Terms  # noqa: E402
from moe_surgery.targets.folded.fold import terms_of  # noqa: E402
from moe_surgery.targets.folded.target import FoldedTarget  # noqa: E402

IN_E4M3 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
"""Whether this GPU multiplies such numbers."""


def terms_in_e4m3(form: str) -> Terms:
    """Those of the block whose experts :func:`stored_weights` stores."""
    return replace(terms_of(GATED), scaled=True, by_row=form == ROWS)


def main() -> None:
    from moe_surgery.kernels.op import compute

    launched = set()
    for spec in (SPEC, *ROUTED.values()):
        block = FoldedTarget().build(spec, weights(spec, torch.bfloat16, device="cuda"), prefix="mlp")
        for tokens in (1, 3, 150):
            x = torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                assert bool(block(x).isfinite().all())
            launched.add(tokens)
    for form in (BLOCKS, ROWS) if IN_E4M3 else ():
        stored, terms = held(stored_weights(GATED, torch.bfloat16, "cuda", form)), terms_in_e4m3(form)
        for tokens in (1, 3) if form == ROWS else (1, 3, 150):
            x = torch.randn(tokens, terms.hidden, device="cuda", dtype=torch.bfloat16)
            assert bool(compute(x, stored, terms).isfinite().all())
    print(f"{len(ROUTED) + 1} blocks, of {sorted(launched)} tokens")


if __name__ == "__main__":
    main()
