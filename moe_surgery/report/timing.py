"""How much faster a replaced block is than the original, measured on the blocks themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_surgery.report.plain import plural, ratio

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = (1, 64)
ROUNDS = 30
_WARM_UP = 3
_FEWEST = 5
_SECONDS = 2.0


@dataclass(frozen=True)
class Sample:
    """Median seconds of ``calls`` calls with ``tokens`` tokens, of the original and of the replacement."""

    tokens: int
    calls: int
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.old / self.new


@dataclass(frozen=True)
class Speed:
    """The samples of one block; ``name`` says which."""

    name: str
    samples: tuple[Sample, ...]

    def sentence(self) -> str:
        """``MoE block 1.9× faster at 1 token, 2.4× faster at 64 tokens (median of 30 calls in turns, NAME)``."""
        parts = []
        for sample in self.samples:
            # Below one the replacement is the slower of the two, and the sentence has to say so.
            word = "faster" if sample.ratio >= 1 else "slower"
            factor = ratio(max(sample.ratio, 1 / sample.ratio))
            parts.append(f"{factor} {word} at {plural(sample.tokens, 'token')}")
        calls = min(sample.calls for sample in self.samples)
        return f"MoE block {', '.join(parts)} (median of {calls} calls in turns, {self.name})"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; ``old`` and ``new`` in seconds."""
        return {"block": self.name, "samples": [{**asdict(sample), "ratio": sample.ratio} for sample in self.samples]}


def measure_blocks(
    old: Callable[[Tensor], object],
    new: Callable[[Tensor], object],
    hidden: int,
    dtype: torch.dtype,
    *,
    name: str,
    device: str | torch.device = "cpu",
    tokens: Sequence[int] = TOKENS,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Speed:
    """Time ``old`` and ``new`` on the same inputs ``[1, tokens, hidden]``, call by call in turns.

    Turns rather than one after the other, so that a change of the machine's speed meets both; the order within a turn
    alternates for the same reason. A block so slow that ``rounds`` turns would take more than two seconds gets fewer.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count in tokens:
        x = torch.randn(1, count, hidden, generator=generator).to(device=device, dtype=dtype)
        times: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad():
            turn, turns = 0, _WARM_UP + rounds
            while turn < turns:
                started = time.perf_counter()
                for which in (0, 1) if turn % 2 else (1, 0):
                    seconds = _seconds((old, new)[which], x)
                    if turn >= _WARM_UP:
                        times[which].append(seconds)
                turn += 1
                if turn == _WARM_UP:
                    fit = int(_SECONDS / (time.perf_counter() - started))
                    turns = _WARM_UP + min(rounds, max(fit, _FEWEST))
        samples.append(Sample(count, len(times[0]), statistics.median(times[0]), statistics.median(times[1])))
    return Speed(name, tuple(samples))


def _seconds(block: Callable[[Tensor], object], x: Tensor) -> float:
    import torch

    # A GPU returns before it is done.
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    block(x)
    if on_gpu:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
