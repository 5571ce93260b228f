"""What became of the families on a GPU, as ``benchmarks/families.py`` wrote it down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from moe_surgery.errors import UsageError
from moe_surgery.testing.families import families

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class OnCuda:
    """Outcomes by family and dtype, and where they were seen."""

    outcomes: Mapping[tuple[str, str], str]
    gpu: str
    versions: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises :class:`UsageError` if the file isn't one of them."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            outcomes = {(row["family"], row["dtype"]): str(row["outcome"]) for row in data["rows"]}
            return cls(outcomes, str(data["machine"]["gpu"]), data["versions"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no result of benchmarks/families.py: {error!r}") from error

    def of(self, family: str) -> str:
        """What became of a family, in both dtypes if they differ."""
        found = [self.outcomes.get((family, dtype), "not tried") for dtype in DTYPES]
        if len(set(found)) == 1:
            return found[0]
        return ", ".join(f"{outcome} in {dtype}" for outcome, dtype in zip(found, DTYPES, strict=True))

    def replaced(self, dtype: str) -> int:
        """How many of transformers' families are replaced in a dtype: all their models, every block."""
        folders: dict[str, list[str]] = {}
        for name, one in families().items():
            folders.setdefault(one.folder, []).append(self.outcomes.get((name, dtype), "not tried"))
        return sum(set(outcomes) == {"replaced"} for outcomes in folders.values())

    def sentence(self) -> str:
        """What to quote: counts, the card and the versions."""
        total = len({one.folder for one in families().values()})
        first, second = (self.replaced(dtype) for dtype in DTYPES)
        named = " · ".join(
            f"{name} {self.versions[name]}" for name in ("torch", "transformers") if name in self.versions
        )
        return (
            f"{first} of {total} families replaced on CUDA in {DTYPES[0]}, {second} of {total} in {DTYPES[1]}, with "
            f"proof ({self.gpu}, {named}; default settings, `benchmarks/families.py`)."
        )
