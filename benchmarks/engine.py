"""A vLLM engine on a GPU without surgery, and with it: to vLLM's own layer, and to this library's kernels.

    python benchmarks/engine.py [--layers 20] [--model FOLDER]

The model is the example naive_talker, at the published size of Qwen3-Omni's talker, with random weights: vLLM's
Qwen3-MoE, to which a shared expert was added by hand. Three engines start one after the other, each in a process of its
own with a folder of its own for compiled graphs and one for Triton's kernels; every block of two of them is replaced
and proven. How long each start took, and surgery in it, are rows of the mode "startup"; one more start, with the
kernels compiled before, is for that alone. Then all three are asked in turns, without, vllm, folded, without, …
"device" is the time between CUDA events around the model's forward, which is the device's own where a step is one
graph; "wall" is that of a whole engine step. Writes results/<machine>-engine.json, and a chart of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from chart_engine import draw  # noqa: E402
from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from talker_checkpoint import write  # noqa: E402

from moe_surgery.engine.timing.asking import Engine, Job, measure  # noqa: E402
from moe_surgery.engine.timing.both_engines import sizes  # noqa: E402
from moe_surgery.timing.blocks import spread  # noqa: E402

IMPLS = ("without", "vllm", "folded")
DECODE, PREFILL = (1, 8, 32, 128), (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def started(arguments: argparse.Namespace, folder: Path, ends: ExitStack) -> tuple[dict[str, Engine], list[Any]]:
    """The engines, started one after the other, each with nothing in Triton's cache, and a row of each start.

    Where this library's kernels are among them, another engine starts with these in the cache, and ends again.
    """
    job = Job(str(arguments.model), DECODE, PREFILL, packs=("qwen3-omni",), dtype="bfloat16", prove=arguments.prove)
    engines: dict[str, Engine] = {}
    found = []
    again = [("folded", "warm")] if "folded" in arguments.impls else []
    for impl, cache in [*((impl, "cold") for impl in arguments.impls), *again]:
        name = f"{impl}-{cache}"
        run = None if impl == "without" else str(folder / f"{name}-run")
        os.environ["TRITON_CACHE_DIR"] = str(folder / f"{impl}-triton")
        begun = time.monotonic()
        engine = Engine(replace(job, run=run, target="auto" if run is None else impl), folder / name)
        ends.callback(engine.end)
        report = engine.report()
        row = {"impl": impl, "mode": "startup", "cache": cache, "start_seconds": round(time.monotonic() - begun, 1)}
        said = "" if report is None else f", {surgery(impl, report)}"
        row["surgery_seconds"] = None if report is None else report["seconds"]
        print(f"{impl}, {cache}: ready after {row['start_seconds']} s{said}", flush=True)
        found.append(row)
        if cache == "cold":
            engines[impl] = engine
        else:
            engine.end()
    return engines, found


def surgery(impl: str, report: dict[str, Any]) -> str:
    """A line on the surgery. Ends the program if a block was not replaced as it should have been."""
    sites = report["sites"]
    wrong = [site for site in sites if site["outcome"] != "replaced" or site["target"] != impl]
    if wrong:
        raise SystemExit(f"{impl}: {wrong[0]['path']} is {wrong[0]['outcome']}: {wrong[0]['reason']}")
    margins = [site["proof"]["margin"] for site in sites if site.get("proof")]
    return f"{len(sites)} blocks, {len(margins)} proven (margin {min(margins):.3g}), surgery {report['seconds']} s"


def rows(engines: dict[str, Engine]) -> list[dict[str, Any]]:
    found = []
    for what, sequences, tokens in sizes(Job("", DECODE, PREFILL)):
        turns = dict(zip(engines, measure(list(engines.values()), what, sequences, tokens), strict=True))
        for impl, each in turns.items():
            row = {"impl": impl, "mode": what.split()[0], "sequences": sequences, "tokens": tokens, "calls": each.calls}
            for name, seconds in (("device", each.device), ("wall", each.wall)):
                row[f"{name}_us"] = round(1e6 * statistics.median(seconds), 1)
                row[f"{name}_us_spread"] = [round(1e6 * bound, 1) for bound in (min(seconds), max(seconds))]
                first = getattr(next(iter(turns.values())), name)
                row[f"{name}_ratio"] = round(statistics.median(first) / statistics.median(seconds), 3)
                row[f"{name}_ratio_spread"] = round(spread(first, seconds), 3)
            found.append(row)
            print(
                f"{impl:8} {row['mode']:8} {sequences:4} x {tokens:5}  device {row['device_us']:9} us "
                f"{row['device_ratio']:.2f}x ±{row['device_ratio_spread']:.2f}  wall {row['wall_us']:9} us "
                f"{row['wall_ratio']:.2f}x ±{row['wall_ratio_spread']:.2f}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a folder with the checkpoint; written first if there is none")
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    parser.add_argument("--prove", choices=("sample", "all"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as ends:
        folder = Path(name)
        from engine_examples import plugin_path

        paths = [plugin_path(folder / "plugins"), str(ROOT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        arguments.model = arguments.model or folder / "model"
        if not arguments.model.exists():
            write(arguments.model, arguments.layers)
        engines, found = started(arguments, folder, ends)
        found += rows(engines)
    result = {**describe(), "command": command(), "layers": arguments.layers, "rows": found}
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{machine_name()}-engine.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".svg").write_text(draw(result), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
