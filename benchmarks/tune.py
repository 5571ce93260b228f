"""Find the kernels' tile sizes on this machine's GPU, and write the tables that choose them.

    python benchmarks/tune.py [--cases talker ...] [--tokens 1 2 ...]

For each number of tokens and each path, the tiles of one product after another are varied and the fastest kept, timed
as a whole block in a CUDA graph of several layers. Writes moe_surgery/kernels/configs/<shape>.json, in which rows of
other numbers of tokens are kept; every time that was taken goes to --log.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from cuda_timing import graph_us  # noqa: E402
from shapes import CASES, Case, random_tensors  # noqa: E402

from moe_surgery.kernels import launch  # noqa: E402
from moe_surgery.kernels.arguments import WIDE_ROWS, Terms, Weights  # noqa: E402
from moe_surgery.kernels.choice import FOLDER, Choice, shape_name  # noqa: E402
from moe_surgery.targets.folded.fold import fold, terms_of  # noqa: E402

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
PAIRS_UP_TO = 16
Row = dict[str, Any]


def _tiles(names: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip([*names.split(), "num_warps", "num_stages"], row, strict=True)) for row in rows]


PAIRS = {
    "logits": _tiles(
        "BR BK", (4, 1024, 4, 1), (1, 1024, 1, 1), (2, 1024, 2, 1), (2, 1024, 4, 1), (4, 512, 4, 1), (8, 512, 4, 1),
        (1, 1024, 4, 1), (2, 512, 4, 1), (1, 2048, 4, 1), (2, 2048, 4, 1), (4, 1024, 8, 1),
    ),
    "gate_up": _tiles(
        "BI BK", (8, 1024, 4, 1), (4, 1024, 4, 1), (4, 1024, 2, 1), (8, 512, 4, 3), (8, 512, 4, 1), (16, 512, 8, 1),
        (8, 1024, 8, 1), (16, 1024, 8, 1), (4, 512, 4, 1), (16, 256, 4, 3), (8, 256, 2, 3), (4, 512, 2, 3),
        (16, 256, 4, 4), (16, 256, 8, 3), (32, 256, 8, 3), (16, 128, 4, 4), (8, 256, 4, 3), (32, 128, 4, 3),
        (4, 2048, 4, 1), (4, 2048, 8, 1), (2, 2048, 4, 1), (2, 4096, 4, 1), (4, 4096, 8, 1), (2, 4096, 8, 1),
    ),
    "down": _tiles(
        "BH BK", (8, 512, 8, 1), (4, 512, 8, 1), (4, 512, 4, 1), (8, 128, 8, 1), (2, 512, 4, 1), (4, 128, 4, 1),
        (8, 128, 4, 1), (16, 128, 8, 1), (4, 256, 4, 1), (8, 256, 8, 1), (2, 512, 8, 1), (2, 256, 4, 1), (2, 128, 4, 1),
        (16, 128, 4, 1), (8, 64, 4, 1), (16, 64, 4, 1), (8, 128, 2, 1), (4, 128, 2, 1),
    ),
}  # fmt: skip


def grouped(tokens: int, per_expert: float) -> dict[str, list[dict[str, int]]]:
    """The candidates of the grouped path: rows of a block near the number of tokens that an expert gets."""
    if per_expert <= 16:
        up = [
            (16, i, k, w, s)
            for i, k, w, s in (
                (32, 128, 4, 3), (32, 128, 4, 4), (32, 64, 4, 5), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3),
                (16, 256, 4, 3), (16, 128, 4, 5), (32, 256, 4, 3), (32, 256, 8, 2), (64, 64, 8, 4), (128, 64, 8, 3),
                (32, 128, 8, 3), (16, 128, 2, 4), (16, 256, 2, 3), (64, 256, 8, 2),
                (32, 512, 4, 2), (32, 256, 4, 2), (16, 512, 4, 2),
            )
        ]  # fmt: skip
        down = [
            (16, h, k, w, s)
            for h, k, w, s in (
                (64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4), (32, 128, 4, 4), (64, 64, 4, 5),
                (128, 128, 8, 3), (64, 128, 8, 3), (32, 128, 2, 3), (128, 64, 8, 4), (256, 64, 8, 3), (32, 256, 4, 2),
                (64, 256, 8, 2), (16, 128, 4, 5), (128, 128, 4, 2), (32, 64, 4, 5), (64, 128, 2, 3),
            )
        ]  # fmt: skip
        if per_expert > 6:
            up += [(32, *row[1:]) for row in up[:8]]
            down += [(32, *row[1:]) for row in down[:8]]
    else:
        sizes = (32, 64) if per_expert <= 64 else (64, 128)
        up, down = [], []
        for m in sizes:
            up += [(m, 64, 64, 4, 3), (m, 64, 64, 4, 4), (m, 128, 64, 8, 3), (m, 128, 64, 8, 4), (m, 64, 64, 8, 4)]
            up += [(m, 64, 128, 4, 2), (m, 32, 128, 4, 3), (m, 64, 128, 8, 2), (m, 128, 64, 4, 3)]
            down += [(m, 128, 64, 4, 3), (m, 128, 64, 4, 4), (m, 256, 64, 8, 3), (m, 256, 64, 8, 4), (m, 128, 64, 8, 4)]
            down += [(m, 128, 128, 4, 2), (m, 64, 128, 4, 3), (m, 128, 128, 8, 2), (m, 64, 64, 4, 4)]
    logits = [(16, 16, 128, 4, 3), (16, 32, 128, 4, 3), (16, 16, 256, 4, 2), (32, 32, 128, 4, 3), (64, 64, 64, 4, 3)]
    logits += [(64, 32, 128, 4, 3), (128, 64, 64, 4, 3)] if tokens > 128 else []
    few = PAIRS["logits"][:8] if tokens <= 64 else []
    return {
        "logits": _tiles("BT BR BK", *logits) + few,
        "gate_up": _tiles("BM BI BK", *up),
        "down": _tiles("BM BH BK", *down),
    }


class Bench:
    """One case on the GPU: several layers of weights, and as many inputs."""

    def __init__(self, case: Case) -> None:
        self.terms = terms_of(case.spec)
        self.weights = [fold(random_tensors(case.spec, seed=seed)) for seed in range(case.layers)]

    def calls(self, tokens: int, choice: Choice) -> list[Callable[[], object]]:
        layers = self.weights if tokens < 1024 else self.weights[:3]
        torch.manual_seed(tokens)
        inputs = [torch.randn(tokens, self.terms.hidden, device="cuda", dtype=torch.bfloat16) for _ in layers]
        return [
            lambda x=x, weights=weights: launch.run(x, weights, self.terms, choice)
            for x, weights in zip(inputs, layers, strict=True)
        ]

    def us(self, tokens: int, row: Row) -> float:
        try:
            return graph_us(self.calls(tokens, Choice.of(row)), replays=20 if tokens < 1024 else 6)
        except Exception as error:  # a tile that needs more shared memory than there is
            print(f"  {row}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            torch.cuda.synchronize()
            return float("inf")


def candidates(terms: Terms, tokens: int) -> Iterator[tuple[str, dict[str, list[dict[str, int]]]]]:
    if tokens <= PAIRS_UP_TO:
        yield "pairs", PAIRS
    if tokens >= 2:
        yield "grouped", grouped(tokens, tokens * terms.top_k / terms.experts)


def tune(bench: Bench, tokens: int, log: list[Row], deadline: float) -> Row:
    """The fastest row for a number of tokens, with its time."""
    best: Row = {"us": float("inf")}
    for path, products in candidates(bench.terms, tokens):
        row: Row = {"tokens": tokens, "path": path, **{name: tiles[0] for name, tiles in products.items()}}
        row["us"] = bench.us(tokens, row)
        for name in ("gate_up", "down", "logits"):
            for tiles in products[name][1:]:
                if time.monotonic() > deadline:
                    break
                trial = {**row, name: tiles}
                trial["us"] = bench.us(tokens, trial)
                log.append(trial)
                if trial["us"] < row["us"]:
                    row = trial
        print(f"{tokens} {path} {row['us']:.2f} {row['gate_up']} {row['down']} {row['logits']}", flush=True)
        best = min(best, row, key=lambda found: found["us"])
    return best


def compile_rows(case: str, tokens: int, rows: list[Row]) -> None:
    """Compile each row's kernels: it fills Triton's cache for the process that measures. Nothing is launched."""
    terms = terms_of(CASES[case].spec)
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    experts, slices, hidden, width = terms.experts, terms.slices, terms.hidden, terms.width

    def of(*shape: int) -> Tensor:
        return torch.empty([1] * len(shape), **like).expand(shape)  # takes no memory

    weights = Weights(
        of(experts, hidden),
        of(experts, 2 * width, hidden),
        of(experts, hidden, width),
        of(1, hidden) if terms.gated else None,
        of(2 * slices * width, hidden) if slices else None,
        None,
        of(hidden, slices * width) if slices else None,
    )
    x = torch.randn(tokens, hidden, **like)
    for row in rows:
        try:
            launch.compile_only(x, weights, terms, Choice.of(row))
        except Exception as error:  # reported where it is measured
            del error


def warm(pool: ProcessPoolExecutor, workers: int, case: str, numbers: list[int]) -> list[Future[None]]:
    """Begin to compile all candidates in parallel."""
    terms = terms_of(CASES[case].spec)
    jobs: dict[str, tuple[int, Row]] = {}
    for tokens in numbers:
        for path, products in candidates(terms, tokens):
            length = max(len(tiles) for tiles in products.values())
            for index in range(length):
                row = {name: tiles[min(index, len(tiles) - 1)] for name, tiles in products.items()}
                few = 2 if path == "pairs" else 9 if tokens <= WIDE_ROWS else WIDE_ROWS + 1
                jobs.setdefault(json.dumps([path, row, few]), (few, {"tokens": tokens, "path": path, **row}))
    waiting = []
    for few in {few for few, _ in jobs.values()}:
        rows = [row for number, row in jobs.values() if number == few]
        waiting += [pool.submit(compile_rows, case, few, rows[i::workers]) for i in range(workers) if rows[i::workers]]
    print(f"{case}: {len(jobs)} rows", flush=True)
    return waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--log", type=Path, default=Path("tune-log.json"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop trying after so long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    log: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        compiled = {case: warm(pool, arguments.workers, case, arguments.tokens) for case in arguments.cases}
        for case in arguments.cases:
            if time.monotonic() > deadline:
                print(f"{case}: no time left", flush=True)
                continue
            bench = Bench(CASES[case])
            name = shape_name(bench.terms)
            path = FOLDER / f"{name}.json"
            known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
            found, log[case] = {row["tokens"]: row for row in known}, []
            for job in compiled[case]:
                job.result()
            for tokens in arguments.tokens:
                found[tokens] = tune(bench, tokens, log[case], deadline)
                rows = [found[tokens] for tokens in sorted(found)]
                table = {"case": case, "device": torch.cuda.get_device_name(), "dtype": "bfloat16", "rows": rows}
                (arguments.out / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
                arguments.log.write_text(json.dumps(log) + "\n", encoding="utf-8")
            del bench
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
