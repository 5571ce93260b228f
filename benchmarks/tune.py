"""Find the kernels' tile sizes on this machine's GPU, and write the tables that come with the library.

    python benchmarks/tune.py [--cases talker ...] [--tokens 1 2 ...] [--e4m3]

For each number of tokens and each path, the tiles of one product after another are varied and the fastest kept, timed
as a whole block in a CUDA graph of several layers: `moe-surgery tune` for the shapes of benchmarks/shapes.py. Writes
moe_surgery/kernels/configs/<shape>.json, in which rows of other numbers of tokens are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from shapes import CASES  # noqa: E402

from moe_surgery.kernels.choice import FOLDER, shape_name  # noqa: E402
from moe_surgery.targets.folded.fold import folded_terms  # noqa: E402
from moe_surgery.tuning.compiling import begin_compiling, compilers  # noqa: E402
from moe_surgery.tuning.table import tune  # noqa: E402

DTYPE = "bfloat16"
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop trying after so long")
    parser.add_argument("--e4m3", action="store_true", help="for experts in e4m3 with a scale for each block")
    arguments = parser.parse_args()
    scaled = arguments.e4m3
    deadline = time.monotonic() + arguments.seconds
    with compilers(arguments.workers) as pool:
        # All at once, so that those of one case are compiled while another is timed.
        waiting = {
            case: begin_compiling(
                pool, arguments.workers, folded_terms(CASES[case].spec, DTYPE, scaled=scaled), DTYPE, arguments.tokens
            )
            for case in arguments.cases
        }
        for place, case in enumerate(arguments.cases):
            for job in waiting[case]:
                job.result()
            spec = CASES[case].spec
            seconds = max(deadline - time.monotonic(), 0.0) / (len(arguments.cases) - place)
            table = tune(spec, DTYPE, arguments.tokens, seconds, scaled=scaled)
            name = shape_name(folded_terms(spec, DTYPE, scaled=scaled))
            table.write(arguments.out / f"{name}.json", DTYPE)
            for row in table.found:
                print(f"{case} {row.tokens} {row.choice.path} {row.before:.2f} -> {row.us:.2f} us", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
