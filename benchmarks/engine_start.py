"""What surgery adds to the start of a vLLM engine: time by number of layers, and memory at its peak.

    python benchmarks/engine_start.py [--layers 4 16 48] [--rounds 3] [--kinds quickest usual]

Starts engines on the example model ``naive_talker`` (tiny: what surgery takes shows most there) with and without
surgery, in turn, each in a process of its own, and takes the median time from the start of the process, imports
included, to the engine that is ready, and the median processor time of it and of its children; blocks are proven as
``run`` does by default, the first and the last of each kind. The quickest start is in one process and eager. The usual
one, as ``vllm serve`` does it, is in two and compiles; each of the two engines has compiled its graphs once before.
Python's bytecode is kept, as it is unless a variable says otherwise: the first start of each isn't timed. Then it does
the same with four larger blocks, as vLLM's routed layer and as a list of MLPs that has to be stacked, and takes the
process's peak of anonymous memory, read every two milliseconds; the unit is the bytes of one block's weights. Writes
benchmarks/results/<machine>-engine_start.json. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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

KINDS = ("quickest", "usual")
LAYERS = 4
"""Of the model that is started as usual, which takes half a minute each time."""
BLOCKS, EXPERTS, WIDTH, HIDDEN = 4, 64, 2048, 128
BLOCK_BYTES = EXPERTS * 3 * WIDTH * HIDDEN * 4


def start(folder: str, run: str | None, begin: float, quickest: bool) -> dict[str, Any]:
    """Start one engine from this process, begun at that time, under surgery if there is a folder for receipts."""
    import moe_surgery

    handle = None if run is None else moe_surgery.install(run=run)
    from vllm import LLM

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=quickest,
        distributed_executor_backend="uni" if quickest else None,
    )
    seconds = time.time() - begin
    surgery = None
    if handle is not None:
        handle.check()
        report = handle.receipts()[0].report
        assert report is not None and all(site["outcome"] == "replaced" for site in report["sites"])
        surgery = report["seconds"]
    if not quickest:
        llm.llm_engine.engine_core.shutdown()  # the other process's time counts once it has ended
    return {"seconds": seconds, "surgery": surgery}


def in_child(
    folder: Path, operated: bool, tmp: Path, *, watched: bool = False, quickest: bool = True
) -> dict[str, Any]:
    from engine_examples import environment

    place = Path(tempfile.mkdtemp(dir=tmp))
    arguments = json.dumps([str(folder), str(place / "run") if operated else None, time.time(), quickest])
    environ = environment(place, VLLM_CACHE_ROOT=str(tmp / f"cache-{operated}"))
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if quickest:
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", arguments],
        env=environ,
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
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {**json.loads(out.splitlines()[-1]), "peak": peak, "cpu": cpu}


def anonymous(pid: int) -> int:
    """A process's anonymous resident memory in bytes: not the pages of files that it maps."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def by_layers(kind: str, layers: list[int], rounds: int, tmp: Path) -> list[dict[str, Any]]:
    from engine.make_checkpoint import make

    rows = []
    for count in layers:
        folder = tmp / f"{count}-layers"
        if not folder.exists():
            make("naive_talker", folder, layers=count)
        for operated in (False, True):
            in_child(folder, operated, tmp, quickest=kind == "quickest")
        found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for number in range(rounds):
            for operated in (False, True) if number % 2 else (True, False):
                found[operated].append(in_child(folder, operated, tmp, quickest=kind == "quickest"))
        plain, operated_s = (statistics.median(each["seconds"] for each in found[operated]) for operated in found)
        plain_cpu, operated_cpu = (statistics.median(each["cpu"] for each in found[operated]) for operated in found)
        added = statistics.median(each["surgery"] for each in found[True])
        rows.append(
            {
                "kind": kind,
                "layers": count,
                "start_s": round(plain, 2),
                "start_with_surgery_s": round(operated_s, 2),
                "longer_percent": round(100 * (operated_s / plain - 1), 1),
                "start_cpu_s": round(plain_cpu, 2),
                "start_with_surgery_cpu_s": round(operated_cpu, 2),
                "more_cpu_percent": round(100 * (operated_cpu / plain_cpu - 1), 1),
                "surgery_s": round(added, 3),
                "surgery_ms_per_layer": round(1e3 * added / count, 1),
                "surgery_percent": round(100 * added / plain, 1),
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
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(start(*json.loads(arguments.child))))
        return
    from command import command
    from machine import describe, machine_name

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        rows = [
            row
            for kind in arguments.kinds
            for row in by_layers(kind, arguments.layers if kind == "quickest" else [LAYERS], arguments.rounds, tmp)
        ]
        peaks = memory(tmp)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine_name()}-engine_start.json"
    data = {**describe(load_before), "command": command(), "block_bytes": BLOCK_BYTES, "rows": rows, "memory": peaks}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
