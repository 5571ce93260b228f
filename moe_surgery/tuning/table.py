"""The table of a shape: found on the GPU, and stored where the kernels look for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.choice import Choice, rows_for
from moe_surgery.report.files import write_whole
from moe_surgery.spec import MoESpec
from moe_surgery.tuning.bench import Bench
from moe_surgery.tuning.search import Tuned, tuned

DTYPES = ("bfloat16", "float16")
"""Those that have tables; float32 takes the default's tiles."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Table:
    """All rows of a shape, and those of them that were looked for."""

    rows: tuple[Choice, ...]
    found: tuple[Tuned, ...]

    def write(self, path: Path, dtype: str) -> None:
        """Store it for the current GPU. Raises :class:`UsageError` where that can't be."""
        data = {"device": torch.cuda.get_device_name(), "dtype": dtype, "rows": [asdict(row) for row in self.rows]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"can't write {path}: {error.strerror or error}") from error
        write_whole(path, json.dumps(data, indent=1) + "\n")


def tune(
    spec: MoESpec,
    dtype: str,
    numbers: Sequence[int],
    seconds: float,
    progress: Progress = lambda done, total, what: None,
    *,
    scaled: bool = False,
) -> Table:
    """A table for blocks of ``spec``, better for each of ``numbers`` tokens than what serves them if that was found.

    It is for ``scaled`` blocks or for others.

    Ends after ``seconds``, or soon after; each number has its share of the time that is left.
    """
    bench = Bench.of(spec, dtype, scaled=scaled)
    served = rows_for(bench.terms, getattr(torch, dtype))
    end, found = time.monotonic() + seconds, []
    for place, tokens in enumerate(sorted(set(numbers))):
        left = (end - time.monotonic()) / (len(set(numbers)) - place)
        found.append(tuned(bench, tokens, served, time.monotonic() + max(left, 0.0)))
        progress(place + 1, len(set(numbers)), f"{tokens} tokens")
    rows = {choice.tokens: choice for choice in served} | {one.tokens: one.choice for one in found}
    return Table(tuple(rows[tokens] for tokens in sorted(rows)), tuple(found))
