"""Starts an engine with surgery, and then one without, on a checkpoint of each architecture; compares what they say.

python tests/engine_sweep.py TABLE [NAME ...]      # write the table of all, or of those named, in Markdown
    --ranks N    under tensor parallelism
    --impl transformers    with the Transformers backend
    --target folded    with blocks that vLLM has fused folded anew

Each pair has a process of its own, in which the engine with surgery comes first: as an operator starts it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare_models
import own_models
from engine_examples import Output, Result, Run, run_all


@dataclass(frozen=True)
class Row:
    """What came of an architecture: how surgery ended, and how far apart the two engines' log-probabilities are.

    ``apart`` is None where one of them didn't start, and ``error`` says with what. ``tokens`` are the same or not.
    """

    name: str
    model: str = ""
    sites: str = ""
    reason: str = ""
    apart: float | None = None
    tokens: bool = False
    error: str = ""
    alike: bool = False
    """There is nothing to compare: the engine without surgery doesn't start either, or there is no such checkpoint."""

    @property
    def good(self) -> bool:
        """Whether surgery made no difference but in what computes."""
        return self.alike if self.error else self.tokens


def names() -> list[str]:
    """Every architecture that there is a checkpoint of, or a config."""
    return sorted([*own_models.names(), *bare_models.CONFIGS])


def write(name: str, folder: Path) -> None:
    """What an engine is started on."""
    (bare_models if name in bare_models.CONFIGS else own_models).write(name, folder)


def compare(
    name: str, folder: Path, tmp: Path, options: dict[str, Any] | None = None, target: str = "auto", **env: str
) -> Row:
    """Of one checkpoint."""
    own = bare_models.OPTIONS if name in bare_models.CONFIGS else own_models.OPTIONS.get(name, {})
    options = {**own, **(options or {})}
    run = Run(str(folder), options, {"run": str(tmp / "run"), "prove": "all", "target": target})
    env = own_models.ENVIRONMENT.get(name, {}) | env
    operated, plain = run_all([run, Run(str(folder), options, guarded=True)], tmp, **env)
    if operated.error and plain.error:
        return Row(name, error=plain.error, alike=True)
    if operated.error or plain.error:
        return Row(name, error=operated.error or f"without surgery: {plain.error}")
    [receipt] = [receipt for receipt in operated.receipts if receipt["rank"] == 0]
    sites = receipt["report"]["sites"]
    outcomes = Counter(site["outcome"] for site in sites)
    assert all(site["proof"]["passed"] for site in sites if site["outcome"] == "replaced")
    return Row(
        name,
        receipt["model"],
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no site",
        "; ".join(dict.fromkeys(site["reason"] for site in sites)),
        _apart(operated, plain),
        [output.tokens for output in operated.outputs] == [output.tokens for output in plain.outputs],
    )


def _apart(one: Result, other: Result) -> float:
    def logprobs(outputs: list[Output]) -> list[float]:
        return [value for output in outputs for value in (*output.prompt_logprobs, *output.logprobs)]

    pairs = zip(logprobs(one.outputs), logprobs(other.outputs), strict=True)
    return max(abs(first - second) for first, second in pairs)


def table(rows: list[Row]) -> str:
    lines = ["| checkpoint | what vLLM builds | sites | largest difference | why |", "|---|---|---|---|---|"]
    for row in rows:
        far = "" if row.apart is None else f"{row.apart:.1e}"
        far += "" if row.tokens or row.apart is None else ", other tokens"
        told = f"not compared: {_short(row.error)}" if row.alike else _short(row.error or row.reason)
        lines.append(f"| {row.name} | {row.model} | {row.sites} | {far} | {told} |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 160 else f"{line[:159]}…"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--target", default="auto")
    parser.add_argument("table", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    given = parser.parse_args()
    options = {"model_impl": given.impl, "tensor_parallel_size": given.ranks}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if given.ranks > 1 else {}
    found: list[Row] = []
    for each in given.names or names():
        with tempfile.TemporaryDirectory() as place:
            try:
                write(each, Path(place) / "model")
            except Exception as failure:
                found.append(Row(each, error=f"no checkpoint: {failure}", alike=True))
            else:
                found.append(compare(each, Path(place) / "model", Path(place), options, given.target, **env))
        print(found[-1], flush=True)
        given.table.write_text(table(found), encoding="utf-8")
    return int(not all(row.good for row in found))


if __name__ == "__main__":
    sys.exit(main())
