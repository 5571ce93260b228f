"""How much faster a whole model's steps are after an operation, measured while it generates.

A part of the model generates, and before each of its forwards the old or the new blocks are put in place, in turns: the
two answer the same question within one run. What is timed is the part's forward, not what ``generate`` does around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from moe_surgery.errors import UsageError
from moe_surgery.interrupts import without_interrupts
from moe_surgery.models.greedy import generating, generating_parts, without_a_trace
from moe_surgery.operate.transaction import Swap, Transaction
from moe_surgery.timing.blocks import Sample, Speed, Turns, now

if TYPE_CHECKING:
    import torch
    from torch import nn

CONTEXT = 32
"""Tokens of a sequence before the decoding steps that are timed."""
BATCHES = (1, 8)
_WARM_UP = 2


@dataclass(frozen=True)
class Steps:
    """What was measured, two speeds for each part with operated blocks, and why the rest wasn't."""

    speeds: tuple[Speed, ...]
    left_out: tuple[str, ...]


def measure_steps(
    model: nn.Module,
    transaction: Transaction,
    *,
    sequences: Sequence[int] = BATCHES,
    prefill: Sequence[int] = (64, 512),
    on_phase: Callable[[str], None] = lambda text: None,
) -> Steps:
    """Time decoding steps of so many ``sequences``, and prefills of so many tokens, of every generating part.

    The new blocks are in place before and afterwards. A part that can't be driven is left out, with the reason.
    """
    if not transaction.swaps:
        return Steps((), ("nothing was replaced",))
    try:
        parts = generating_parts(model)
    except UsageError as error:
        return Steps((), (str(error),))
    speeds: list[Speed] = []
    left_out: list[str] = []
    rest = list(transaction.swaps)
    for name, module in parts.items():
        modules = set(module.modules())
        swaps = [swap for swap in transaction.swaps if swap.parent in modules]
        rest = [swap for swap in rest if swap not in swaps]
        if swaps:
            try:
                speeds += _measure_part(_Part(name, module, swaps), sequences, prefill, on_phase)
            except Exception as error:
                # Whatever a stranger's generate raises: the blocks were timed all the same.
                left_out.append(f"{name}: {type(error).__name__}: {shorten(str(error), 200, placeholder=' …')}")
    if rest:
        left_out.append(f"{rest[0].path} is in no part that generates tokens")
    return Steps(tuple(speeds), tuple(left_out))


@dataclass(frozen=True)
class _Part:
    """A generating part of a model, and the exchanges within it."""

    name: str
    module: nn.Module
    swaps: Sequence[Swap]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def place(self, which: int) -> None:
        """Put the old blocks (0) or the new ones (1) in place."""
        for swap in self.swaps:
            module = (swap.old, swap.new)[which]
            assert module is not None
            swap.place(module)


def _measure_part(
    part: _Part, sequences: Sequence[int], prefill: Sequence[int], on_phase: Callable[[str], None]
) -> Iterator[Speed]:
    plan: tuple[tuple[Literal["decode step", "prefill"], Sequence[int], Callable[[_Part, int], Sample]], ...] = (
        ("decode step", sequences, _decode),
        ("prefill", prefill, _prefill),
    )
    for what, sizes, measure in plan:
        samples = []
        for size in sizes:
            on_phase(f"timing {part.name}: {what}, {size}")
            samples.append(measure(part, size))
        if samples:
            yield Speed(part.name, tuple(samples), what)


def _decode(part: _Part, sequences: int) -> Sample:
    turns = Turns(warm_up=_WARM_UP)
    with _timed(part, turns, after=1):
        _generate(part, sequences, CONTEXT, 1 + turns.most, turns)
    return turns.sample(tokens=1, sequences=sequences)


def _prefill(part: _Part, tokens: int) -> Sample:
    turns = Turns(warm_up=_WARM_UP)
    while not turns.done:
        with _timed(part, turns, after=0):
            _generate(part, 1, tokens, 1, turns)
    return turns.sample(tokens=tokens)


@contextmanager
def _timed(part: _Part, turns: Turns, *, after: int) -> Iterator[None]:
    """Let the blocks whose turn it is answer each forward of ``part`` but the first ``after`` ones, and time it."""
    seen, started = 0, 0.0

    def before(*_: object) -> None:
        nonlocal started
        part.place(turns.which)
        started = now(part.device)

    def behind(*_: object) -> None:
        nonlocal seen
        seconds = now(part.device) - started
        seen += 1
        if seen > after and not turns.done:
            turns.took(seconds)

    handles = [part.module.register_forward_pre_hook(before), part.module.register_forward_hook(behind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with without_interrupts():
            part.place(1)


def _generate(part: _Part, sequences: int, tokens: int, count: int, turns: Turns) -> None:
    """Continue random prompts by ``count`` tokens, or fewer if ``turns`` are done before."""
    import torch

    arguments = generating(part.module, _prompts(part.module, sequences, tokens), count, part.name)
    arguments["generation_config"].min_new_tokens = count  # no end-of-sequence token before

    def enough(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(ids),), turns.done, device=ids.device)

    # The old blocks are not in the module yet, but will be when it is called.
    old = [swap.old for swap in part.swaps if swap.old is not None]
    with torch.no_grad(), without_a_trace(part.module, *old):
        part.module.generate(**arguments, stopping_criteria=[enough])  # type: ignore[operator]


def _prompts(module: nn.Module, sequences: int, tokens: int) -> list[list[int]]:
    """Random tokens, none of which the config has a meaning for: an image's place would ask for an image."""
    import torch

    embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
    special = set(_special(module.config.to_dict()))  # type: ignore[operator, union-attr]
    plain = torch.tensor([token for token in range(embedding.weight.shape[0]) if token not in special])
    chosen = torch.randint(len(plain), (sequences, tokens), generator=torch.Generator().manual_seed(0))
    ids: list[list[int]] = plain[chosen].tolist()
    return ids


def _special(config: dict[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(key).endswith(("_id", "_ids")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
