"""What carrying a plan out would cost: memory beyond the model, and time beyond loading it.

The factors were measured by ``benchmarks/apply_memory.py`` (``benchmarks/results/epyc-2core-apply_memory.json``), in
units of a block's bytes and with the proof included. Targets that move weights by reference need less. What a block
takes however small it is was seen once, in ``make demo``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.report.words import duration, size

_PROOF = 0.31
_EACH = 0.15
_SECONDS, _SECONDS_WITHOUT_UNDO = (13.6 / 4 - _EACH) / 306972672, (21.9 / 4 - _EACH) / 306972672
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Costs:
    """Bytes: of the model, its ``count`` ``blocks`` to replace, the ``largest`` of these; and ``free`` ones here.

    ``device`` is the type of the device they are to be on. What is free on another than this machine's CPU isn't known.
    """

    count: int
    model: int
    blocks: int
    largest: int
    free: int | None
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def of(cls, model: nn.Module, paths: Iterable[str], device: str = "cpu") -> Costs:
        """Of replacing the blocks at ``paths`` on ``device``, in the dtype that the model has."""
        blocks = [_bytes(model.get_submodule(path)) for path in paths]
        meta = all(parameter.is_meta for parameter in model.parameters())
        # What a loaded model holds is taken already.
        free = _free(_MEMINFO) if device == "cpu" else None
        held = 0 if meta else _bytes(model)
        dtype = str(own_dtype(dict(model.named_parameters()))).removeprefix("torch.")
        available = None if free is None else free + held
        return cls(len(blocks), _bytes(model), sum(blocks), max(blocks, default=0), available, device, dtype)

    @property
    def extra(self) -> int:
        """Bytes that ``apply`` needs beyond the model, at most: a second copy of the blocks, and the proof of one."""
        return round(self.blocks + _PROOF * self.largest)

    @property
    def extra_without_undo(self) -> int:
        """The same where originals are given up one by one."""
        return round((1 + _PROOF) * self.largest)

    @property
    def seconds(self) -> float | None:
        """What it takes beyond loading, about, on two cores of an AMD EPYC; None on other devices than a CPU."""
        return _EACH * self.count + self.blocks * _SECONDS if self.device == "cpu" else None

    @property
    def seconds_without_undo(self) -> float | None:
        """The same where originals are given up one by one."""
        return _EACH * self.count + self.blocks * _SECONDS_WITHOUT_UNDO if self.device == "cpu" else None

    def fits(self, extra: int) -> bool | None:
        """Whether the model and ``extra`` fit into this machine's free memory; None where that isn't known."""
        return None if self.free is None else self.model + extra <= self.free

    def sentence(self) -> str:
        """All of it in a line."""
        parts = [
            f"{size(self.blocks)} of blocks in a model of {size(self.model)} on {self.device} in {self.dtype}",
            f"apply needs up to {size(self.extra)} more, {size(self.extra_without_undo)} with --no-undo",
        ]
        if self.seconds is not None:
            parts.append(f"about {duration(self.seconds)} beyond loading, as two cores of an AMD EPYC took")
        if self.free is not None:
            parts.append(f"{self._fitting()} the memory that is free here")
        return " · ".join(parts)

    def _fitting(self) -> str:
        if self.fits(self.extra):
            return "fits into"
        return "only --no-undo fits into" if self.fits(self.extra_without_undo) else "DOES NOT FIT into"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data, in bytes and seconds."""
        return {
            **asdict(self),
            "extra": self.extra,
            "extra_without_undo": self.extra_without_undo,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "seconds_without_undo": None if self.seconds_without_undo is None else round(self.seconds_without_undo, 3),
            "fits": self.fits(self.extra),
            "fits_without_undo": self.fits(self.extra_without_undo),
        }


def _bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each tensor once."""
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _free(meminfo: Path) -> int | None:
    """Bytes that may still be taken, as the system says."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else 1024 * int(found[1])
