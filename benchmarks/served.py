"""Engines as people serve them: quantised, with adapters, over two ranks; each with surgery and without.

    python benchmarks/served.py [--kinds naive_talker …] [--formats fp8_block …] [--parallel 1 tp2 "tp2 ep"] [--lora]

The models are those of served_checkpoint.py, quantised by tests/quantised_checkpoint.py. Of every case an engine with
surgery and one without stand at the same time, both of all their blocks proven. Both continue the same prompts
greedily, with each adapter where there are any, and are then timed in turns, one decoding step of one sequence: by CUDA
events around the model's forward on one rank, and by the clock on two. With --eager there are no
graphs, and nothing is timed. Adds its rows to results/<machine>-served.json, in place of those of the same case that
ran likewise.

``tokens_equal`` says that all tokens are the same. Where they aren't, ``apart`` has, of the first that differs, how far
its likeliest two were apart without surgery, in nats: a tie that rounding decides is near zero.
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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402
from served_checkpoint import ADAPTERS, write, write_adapter  # noqa: E402

KINDS = ("naive_talker", "unfused_deepseek", "gpt_oss")
PLAIN, MXFP4 = "bfloat16", "mxfp4"
FORMATS = (
    PLAIN,
    "fp8_block",
    "fp8_tensor",
    "fp8_static",
    "ct_fp8_channel",
    "ct_int4",
    "ct_mxfp4",
    "ct_nvfp4",
    "gptq",
    "awq",
    "modelopt_fp8",
    MXFP4,
)
PARALLEL: dict[str, dict[str, Any]] = {
    "1": {},
    "tp2": {"tensor_parallel_size": 2, "disable_custom_all_reduce": True},
    "tp2 ep": {"tensor_parallel_size": 2, "disable_custom_all_reduce": True, "enable_expert_parallel": True},
}
EAGER: dict[str, dict[str, Any]] = {
    "no": {},
    "yes": {"enforce_eager": True},
    # Without graphs, and with the operators that graphs would be made of.
    "native": {"compilation_config": {"mode": 0, "cudagraph_mode": "NONE", "custom_ops": ["none"]}},
}
RAN = {"no": "in graphs", "yes": "eagerly", "native": "eagerly, as for graphs"}
"""What the table says of each."""
LAYERS = {"naive_talker": 6, "unfused_deepseek": 4, "gpt_oss": 2}
EXPERTS = {"naive_talker": 128, "unfused_deepseek": 64, "gpt_oss": 8}
GROUP = 128
_TURNS = 5


@dataclass(frozen=True)
class Case:
    """One engine, with surgery and without."""

    kind: str
    format: str
    parallel: str
    lora: bool
    target: str

    def key(self) -> dict[str, Any]:
        return {"model": self.kind, **{k: v for k, v in vars(self).items() if k != "kind"}}


class Child:
    """An engine in a process of its own; see served_engine.py."""

    def __init__(self, job: dict[str, Any], log: Path, gpu: int) -> None:
        environ = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
        one = job["options"].get("tensor_parallel_size", 1) == 1
        if one:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[gpu] if shown else str(gpu)
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if one else "1"
        self.log = log
        self._child = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "served_engine.py"), json.dumps(job)],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def told(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self._child.wait()}"}

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()
        return self.told()

    def end(self) -> None:
        self._child.kill()
        self._child.wait()


def started(case: Case, arguments: argparse.Namespace, folder: Path, gpu: int, ends: ExitStack) -> tuple[Child, Child]:
    """The engine with surgery and the one without, neither of which stands yet."""
    options = {**PARALLEL[case.parallel], **EAGER[arguments.eager]}
    if case.lora:
        options |= {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1}
    model = checkpoint(case, arguments.small, folder)
    name = "-".join(str(value).replace(" ", "_") for value in case.key().values())
    children = []
    for which in ("with", "without"):
        run = str(folder / f"{name}-run") if which == "with" else None
        job = {"folder": str(model), "options": options, "run": run, "target": case.target}
        job |= {"dtype": arguments.dtype, "timed": arguments.eager == "no"}
        children.append(Child(job, folder / f"{name}-{which}.log", gpu))
        ends.callback(children[-1].end)
    return children[0], children[1]


def checkpoint(case: Case, small: bool, folder: Path) -> Path:
    """The case's checkpoint, written unless it is there."""
    from quantised_checkpoint import write as quantised

    source = folder / f"{case.kind}-source"
    if not source.exists():
        layers, experts = (2, 16) if small else (LAYERS[case.kind], EXPERTS[case.kind])
        write(case.kind, source, layers, experts)
    if case.format in (PLAIN, MXFP4):
        return source
    model = folder / f"{case.kind}-{case.format}"
    if not model.exists():
        quantised(source, model, case.format, group=GROUP)
    return model


def row(
    case: Case, pair: tuple[Child, Child], told: tuple[dict[str, Any], dict[str, Any]], setting: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """What came of a case whose engines ``told`` of their start; ``setting`` is what the row tells of them besides."""
    operated, plain = pair
    has, had = told
    found: dict[str, Any] = {**case.key(), **setting, "tokens_equal": None, "apart": None, "decode_ratio": None}
    if "error" in has or "error" in had:
        which = "with surgery" if "error" in has else "without surgery"
        error = (has if "error" in has else had)["error"]
        return {**found, "outcome": "failed", "reason": f"{which}: {error}"[:400]}
    sites = has["sites"]
    outcomes = sorted({site["outcome"] for site in sites})
    found["outcome"] = ", ".join(outcomes)
    found["reason"] = next((site["reason"] for site in sites), "")
    found["targets"] = sorted({str(site["target"]) for site in sites})
    proofs = [site["proof"] for site in sites if site.get("proof")]
    if proofs:
        found["proof"] = {
            "reference": proofs[0]["reference"],
            "blocks": len(proofs),
            "margin": round(min(proof["margin"] for proof in proofs), 1),
            "mutants": min(len(proof["mutants"]) for proof in proofs),
        }
    adapters: list[str | None] = [None]
    if case.lora:
        for part in ADAPTERS:
            where = folder / f"{case.kind}-{part}-adapter"
            if not where.exists():
                write_adapter(folder / f"{case.kind}-source", where, part)
            adapters.append(str(where))
    equal, apart, said = [], [], []
    for adapter in adapters:
        mine, theirs = operated.ask(adapter=adapter), plain.ask(adapter=adapter)
        if "error" in mine or "error" in theirs:
            error = mine.get("error") or f"without surgery: {theirs['error']}"
            return {**found, "outcome": f"{found['outcome']}, failed", "reason": error[:400]}
        said.append([each["tokens"] for each in theirs["answer"]])
        for a, b in zip(mine["answer"], theirs["answer"], strict=True):
            equal.append(a["tokens"] == b["tokens"])
            if not equal[-1]:
                first = next(i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y)
                apart.append(b["gaps"][first])
    found["tokens_equal"], found["apart"] = all(equal), [round(gap, 4) for gap in apart] or None
    if case.lora:
        found["adapters"] = list(ADAPTERS)
        found["adapters_heard"] = all(other != said[0] for other in said[1:])
    if setting["eager"] != "no":
        return found
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TURNS):
        for child, mine_ in zip(pair, times, strict=True):
            mine_.append(child.ask(decode=True)["answer"])
    ratios = [without / with_ for with_, without in zip(*times, strict=True)]
    found["decode_us"] = {"with": round(1e6 * statistics.median(times[0]), 1)}
    found["decode_us"]["without"] = round(1e6 * statistics.median(times[1]), 1)
    found["decode_ratio"] = round(statistics.median(ratios), 3)
    found["decode_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return found


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = []
    for kind in arguments.kinds:
        for form in arguments.formats:
            if (form == MXFP4) != (kind == "gpt_oss"):
                continue
            found += [Case(kind, form, parallel, arguments.lora, arguments.target) for parallel in arguments.parallel]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--parallel", nargs="+", choices=PARALLEL, default=["1"])
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--target", default="vllm", choices=("vllm", "auto", "folded"))
    parser.add_argument("--eager", default="no", choices=EAGER)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--small", action="store_true", help="two layers of 16 experts, of the same width")
    parser.add_argument("--write", action="store_true", help="write the checkpoints and start nothing")
    parser.add_argument("--at-once", type=int, default=2, help="cases whose engines are started together")
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs; kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--table", type=Path, help="print a result file as docs/engine.md has it, and start nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))["rows"]))
        return
    from engine_examples import plugin_path

    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(exist_ok=True)
        paths = [plugin_path(folder / "plugins"), str(ROOT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        setting = {"dtype": arguments.dtype, "eager": arguments.eager, "small": arguments.small}
        wanted, begun, gpus = cases(arguments), time.monotonic(), torch.cuda.device_count()
        if arguments.write:
            for case in wanted:
                checkpoint(case, arguments.small, folder)
            return
        for first in range(0, len(wanted), arguments.at_once):
            some = wanted[first : first + arguments.at_once]
            with ExitStack() as ends:
                pairs = [started(case, arguments, folder, at % gpus, ends) for at, case in enumerate(some)]
                starts = [(mine.told(), theirs.told()) for mine, theirs in pairs]  # all, before any is timed
                for case, pair, told in zip(some, pairs, starts, strict=True):
                    found = row(case, pair, told, setting, folder)
                    print(f"{time.monotonic() - begun:4.0f} s {json.dumps(found, ensure_ascii=False)}", flush=True)
                    keep(arguments.out, found)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return FORMATS.index(row["format"]), row["parallel"], row["lora"], row["model"], row["target"], row["eager"]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown: one for each format, parallelism, adapters and target of a model."""
    heads = ("format", "parallelism", "target", "model", "ran", "outcome", "proof", "tokens", "decode")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for found in sorted(rows, key=_order):
        form = found["format"] + (", LoRA on " + " and ".join(found["adapters"]) if found["lora"] else "")
        proof = found.get("proof")
        proven = f"{proof['reference']}, {proof['mutants']} mutants, {proof['margin']:g} ×" if proof else ""
        same = {True: "equal", None: ""}.get(found["tokens_equal"], f"apart at gaps of {found['apart']}")
        ratio = "" if found["decode_ratio"] is None else f"{found['decode_ratio']:.2f} ×"
        parallel, target = {"1": "one GPU"}.get(found["parallel"], found["parallel"]), found["target"]
        ran = RAN[found["eager"]]
        cells = (form, parallel, target, found["model"], ran, found["outcome"], proven, same, ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(out: Path, found: dict[str, Any]) -> None:
    """Add a row to the result file, in place of an older one of the same case."""
    out.mkdir(exist_ok=True)
    path = out / f"{machine_name()}-served.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    key = ("model", "format", "parallel", "lora", "target", "eager")
    rows = [old for old in rows if any(old[name] != found[name] for name in key)]
    result = {**describe(), "command": command(), "rows": [*rows, found]}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
