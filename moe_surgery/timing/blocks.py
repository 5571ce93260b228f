"""How much faster a replaced block, or a model with such blocks, is than the original."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe_surgery.report.words import plural, ratio
from moe_surgery.timing.busy import Watch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = (1, 64)
ROUNDS = 30
_WARM_UP = 3
_FEWEST = 5
_SECONDS = 2.0
# With more than this share of the cores gone to others, or turns that far apart, a ratio says nothing of the blocks.
_BUSY, _UNSTEADY = 0.2, 0.5


@dataclass(frozen=True)
class Sample:
    """Median seconds of ``calls`` calls, of the original and of the replacement.

    A call has ``tokens`` tokens for each of ``sequences`` sequences. ``spread`` is that of the ratio where it is known,
    as :func:`spread` says. ``others`` is the share of the cores that other processes had meanwhile,
    where that was watched.
    """

    tokens: int
    calls: int
    old: float
    new: float
    sequences: int = 1
    spread: float | None = None
    others: float | None = None

    @property
    def ratio(self) -> float:
        return self.old / self.new

    @property
    def differs(self) -> bool:
        """Whether the two can be told apart."""
        return self.spread is None or abs(self.ratio - 1) > self.spread

    @property
    def doubt(self) -> str | None:
        """Why there is no ratio to speak of, if the machine didn't let it be measured."""
        if self.others is not None and self.others > _BUSY:
            return f"the machine was busy, other processes had {100 * self.others:.0f} % of its cores"
        if self.spread is not None and self.spread > _UNSTEADY * self.ratio:
            return f"the machine was busy or unsteady, single turns' ratios lie ± {self.spread:.2g} around"
        return None

    def words(self) -> str:
        """``1.9× faster ± 0.1``, ``no difference``, or ``no ratio`` and why."""
        if self.doubt is not None:
            return f"no ratio ({self.doubt})"
        if not self.differs:
            return f"no difference (± {self.spread:.2g})"
        # Below one the replacement is the slower of the two, and the sentence has to say so.
        word, factor = ("faster", self.ratio) if self.ratio >= 1 else ("slower", 1 / self.ratio)
        return f"{ratio(factor)} {word}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")


def spread(old: Sequence[float], new: Sequence[float]) -> float:
    """Half of what eight in ten turns' ratios lie within; of fewer than ten turns, half of what all do."""
    ratios = sorted(before / after for before, after in zip(old, new, strict=True))
    left_out = len(ratios) // 10
    return (ratios[-1 - left_out] - ratios[left_out]) / 2


@dataclass(frozen=True)
class Speed:
    """The samples of ``what``. ``name`` says of which block, part or engine, ``how`` in what order calls were timed."""

    name: str
    samples: tuple[Sample, ...]
    what: Literal["MoE block", "decode step", "prefill"] = "MoE block"
    how: str = "in turns"

    def sentence(self) -> str:
        """``MoE block 1.9× faster at 1 token, 2.4× faster at 64 tokens (median of 30 calls in turns, NAME)``."""
        doubts = [sample.doubt for sample in self.samples]
        if all(doubts):
            sizes = ", ".join(self.size(sample) for sample in self.samples)
            return f"{self.what}: no ratio at {sizes}: {doubts[0]} ({self.name})"
        parts = []
        for sample in self.samples:
            parts.append(f"{sample.words()} at {self.size(sample)}")
        calls = min(sample.calls for sample in self.samples)
        return f"{self.what} {', '.join(parts)} (median of {plural(calls, 'call')} {self.how}, {self.name})"

    def size(self, sample: Sample) -> str:
        """``64 tokens``, or ``8 sequences`` of a step."""
        return plural(sample.sequences, "sequence") if self.what == "decode step" else plural(sample.tokens, "token")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; ``old`` and ``new`` in seconds, ``ratio`` null where the machine was too busy for one."""
        key = "block" if self.what == "MoE block" else "part"
        named = {key: self.name} if key == "block" else {key: self.name, "what": self.what}
        return {
            **named,
            "samples": [{**asdict(sample), "ratio": None if sample.doubt else sample.ratio} for sample in self.samples],
        }


class Turns:
    """Whose turn it is, old (0) or new (1), what each took, and whether it is enough.

    Turns rather than one after the other, so that a change of the machine's speed meets both; the order within a turn
    alternates for the same reason. Where ``rounds`` turns would take more than two seconds there are fewer.
    """

    def __init__(self, rounds: int = ROUNDS, warm_up: int = _WARM_UP) -> None:
        self.times: tuple[list[float], list[float]] = ([], [])
        self.most = 2 * (warm_up + rounds)
        self._rounds, self._warm_up = rounds, 2 * warm_up
        self._calls, self._turn = 0, 0.0
        self._watch = Watch()

    @property
    def which(self) -> int:
        turn, second = divmod(self._calls, 2)
        return second if turn % 2 else 1 - second

    @property
    def done(self) -> bool:
        return self._calls >= self.most

    def took(self, seconds: float) -> None:
        """Whose turn it was took so long; it is the next one's turn."""
        if self._calls >= self._warm_up:
            self.times[self.which].append(seconds)
        self._calls += 1
        self._turn += seconds
        if self._calls == self._warm_up:
            self._watch = Watch()
            fit = int(_SECONDS / self._turn)
            self.most = self._warm_up + 2 * min(self._rounds, max(fit, _FEWEST))
        elif self._calls % 2 == 0:
            self._turn = 0.0

    def sample(self, *, tokens: int, sequences: int = 1) -> Sample:
        old, new = self.times
        medians = statistics.median(old), statistics.median(new)
        return Sample(tokens, len(old), *medians, sequences, spread(old, new), self._watch.others())


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
    """Time ``old`` and ``new`` on the same inputs ``[1, tokens, hidden]``, call by call in turns."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count in tokens:
        x = torch.randn(1, count, hidden, generator=generator).to(device=device, dtype=dtype)
        turns = Turns(rounds)
        with torch.no_grad():
            while not turns.done:
                started = now(x.device)
                (old, new)[turns.which](x)
                turns.took(now(x.device) - started)
        samples.append(turns.sample(tokens=count))
    return Speed(name, tuple(samples))


def now(device: torch.device) -> float:
    """The time, once ``device`` is done: a GPU returns before it is."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()
