"""The table in docs/gpu.md of what ``against_vllm.py`` found: how many times as fast as vLLM's layer each block is.

python benchmarks/table_against_vllm.py [RESULT]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "h100-against_vllm.json"
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios of ``rows`` by case and number of tokens, as Markdown."""
    ratios = {(row["case"], row["tokens"]): row["ratio"] for row in rows}
    lines = [f"| tokens | {' | '.join(map(str, TOKENS))} |", "|---" * (len(TOKENS) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines.append(f"| {case} | {' | '.join(f'{ratios[case, tokens]:.2f}' for tokens in TOKENS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULT)
    print(table(json.loads(parser.parse_args().result.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
