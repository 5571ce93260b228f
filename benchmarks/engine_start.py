"""What surgery adds to the start of a vLLM engine: time by number of layers, and memory at its peak.

    python benchmarks/engine_start.py [--layers 4 16 48] [--rounds 3]

Starts engines on the example model ``naive_talker`` (tiny: what surgery takes shows most there) with and without
surgery, in turn, each in a process of its own, and takes the median time from the start of the process, imports
included, to the engine that is ready; blocks are proven as ``run`` does by default, the first and the last of each
kind. Then it does the same with four larger blocks, as vLLM's routed layer and as a list of MLPs that has to be
stacked, and takes the process's peak of anonymous memory, read every two milliseconds; the unit is the bytes of one
block's weights. Writes benchmarks/results/<machine>-engine_start.json. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

BLOCKS, EXPERTS, WIDTH, HIDDEN = 4, 64, 2048, 128
BLOCK_BYTES = EXPERTS * 3 * WIDTH * HIDDEN * 4


def start(folder: str, run: str | None, begin: float) -> dict[str, Any]:
    """Start one engine in this process, begun at that time, under surgery if there is a folder for receipts."""
    import moe_surgery

    handle = None if run is None else moe_surgery.install(run=run)
    from vllm import LLM

    LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    seconds = time.time() - begin
    surgery = None
    if handle is not None:
        handle.check()
        report = handle.receipts()[0].report
        assert report is not None and all(site["outcome"] == "replaced" for site in report["sites"])
        surgery = report["seconds"]
    return {"seconds": seconds, "surgery": surgery}


def in_child(folder: Path, operated: bool, tmp: Path, *, watched: bool = False) -> dict[str, Any]:
    from engine_examples import environment

    place = Path(tempfile.mkdtemp(dir=tmp))
    arguments = json.dumps([str(folder), str(place / "run") if operated else None, time.time()])
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", arguments],
        env=environment(place, VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        stdout=(place / "out").open("w"),
        stderr=subprocess.STDOUT,
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.002 if watched else 0.2)
    out = (place / "out").read_text()
    if child.returncode:
        raise SystemExit(out)
    return {**json.loads(out.splitlines()[-1]), "peak": peak}


def anonymous(pid: int) -> int:
    """A process's anonymous resident memory in bytes: not the pages of files that it maps."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def by_layers(layers: list[int], rounds: int, tmp: Path) -> list[dict[str, Any]]:
    from engine.make_checkpoint import make

    rows = []
    for count in layers:
        folder = tmp / f"{count}-layers"
        make("naive_talker", folder, layers=count)
        found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for number in range(rounds):
            for operated in (False, True) if number % 2 else (True, False):
                found[operated].append(in_child(folder, operated, tmp))
        plain = statistics.median(each["seconds"] for each in found[False])
        added = statistics.median(each["surgery"] for each in found[True])
        rows.append(
            {
                "layers": count,
                "start_s": round(plain, 2),
                "start_with_surgery_s": round(statistics.median(each["seconds"] for each in found[True]), 2),
                "surgery_s": round(added, 3),
                "surgery_ms_per_layer": round(1e3 * added / count, 1),
                "added_percent": round(100 * added / plain, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def memory(tmp: Path) -> list[dict[str, Any]]:
    from engine.make_checkpoint import make

    rows = []
    for kind in ("naive_talker", "list_moe"):
        folder = tmp / kind
        make(kind, folder, layers=BLOCKS, experts=EXPERTS, width=WIDTH)
        plain, operated = (in_child(folder, operated, tmp, watched=True)["peak"] for operated in (False, True))
        rows.append(
            {
                "kind": kind,
                "blocks": BLOCKS,
                "model_blocks": round(plain / BLOCK_BYTES, 2),
                "peak_extra_blocks": round((operated - plain) / BLOCK_BYTES, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(start(*json.loads(arguments.child))))
        return
    from machine import describe, machine_name

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        rows, peaks = by_layers(arguments.layers, arguments.rounds, tmp), memory(tmp)
    command = "python benchmarks/engine_start.py"
    command += f" --layers {' '.join(map(str, arguments.layers))} --rounds {arguments.rounds}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine_name()}-engine_start.json"
    data = {**describe(load_before), "command": command, "block_bytes": BLOCK_BYTES, "rows": rows, "memory": peaks}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
