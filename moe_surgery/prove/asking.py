"""Asking a block: the shapes, batch sizes and strides it is called with, and what must hold for every call."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_surgery.errors import DeviceError
from moe_surgery.prove.metrics import Truth
from moe_surgery.prove.probe import FAMILIES, UNIT, ZERO, Probes
from moe_surgery.prove.settling import settle

Block = Callable[[Tensor], Tensor]

# Batch sizes on both sides of those at which blocks are known to branch (1, 16, 64), and a longer one.
_FEW, _MIDDLE, _BEYOND, _LONG = 2, 17, 72, 320
_TOGETHER = 2048  # outputs that are compared at once
FEWEST = 24
"""Fewer different tokens don't fill every call."""
NUMBERS = (1, _FEW, _MIDDLE, FEWEST, _BEYOND, _LONG)
"""The numbers of tokens that a new block is asked about at a time, near enough."""
STRIDED = "4 sequences of 6 tokens, not contiguous"
EMPTY = "no token"


class Misconduct(Exception):
    """A block did something that no right block does; the message says what, and on which input."""


class Refused(Misconduct):
    """A block raised an error instead of answering."""


@dataclass(frozen=True, eq=False)
class Call:
    """One input, and which probe each of its tokens is."""

    name: str
    x: Tensor
    tokens: Tensor


def calls(probes: Probes, *, new: bool, empty: bool = True, sizes: Iterable[int] = ()) -> Iterator[Call]:
    """The calls that ask a block about every probe, alone and in company; ``empty``: about no token at all too.

    A new block is asked with inputs [T, H] too, and with a long sequence. An old block gets [B, S, H] only, and no
    more than 72 tokens at once: some copy an expert's weights for each token. ``sizes`` are further numbers of tokens.
    """
    x, count = probes.x, len(probes.x)
    device = x.device
    everyone = torch.arange(count, device=device)
    mixed = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(count), device="cpu").to(device)
    if new:
        part = everyone.repeat(-(-_LONG // count))[: max(count, _LONG)]
        yield _sequence(x, part)
        yield Call("72 tokens, 2-D", x[mixed[:_BEYOND]], mixed[:_BEYOND])
        first = asked_alone(probes)[0]
        yield Call("one token, 2-D", x[first].clone(), everyone[first])
        yield Call("17 tokens, 2-D, every other row", x[mixed[: 2 * _MIDDLE]][::2], mixed[: 2 * _MIDDLE : 2])
    else:
        for part in everyone.split(_BEYOND):
            yield _sequence(x, part)
    yield _sequence(x, mixed[-_FEW:])
    part = mixed[:FEWEST]
    yield Call("4 sequences of 6 tokens", x[part].view(4, 6, -1), part)
    yield Call(STRIDED, x[part.view(4, 6).T.flatten()].view(6, 4, -1).transpose(0, 1), part)
    for token in asked_alone(probes):
        yield _sequence(x, token)
    crowd = probes.of(UNIT)[-1:].repeat(_BEYOND)
    yield Call("72 times the same token", x[crowd][None], crowd)
    for size in sizes:
        yield _sequence(x, everyone.repeat(-(-size // count))[:size])
    if empty:
        yield Call(EMPTY, x[:0][None], everyone[:0])


def asked_alone(probes: Probes) -> list[Tensor]:
    """The tokens, each [1], that blocks are asked about alone: matrix products may then add in another order."""
    unit, zero = probes.of(UNIT), probes.of(ZERO)
    return [unit[:1], unit[-1:], *([zero[:1]] if len(zero) else [])]


def _sequence(x: Tensor, tokens: Tensor) -> Call:
    name = f"{len(tokens)} tokens in one sequence" if len(tokens) > 1 else "one token"
    return Call(name, x[tokens][None], tokens)


@dataclass(frozen=True, eq=False)
class Answers:
    """How a block did.

    ``worst`` [families] is the greatest distance in each family and ``where`` the call it was seen on; ``flipped`` [N]
    are the tokens that took another choice of experts in some call; ``refused`` the calls that it was excused from.
    """

    worst: list[float]
    where: list[str]
    flipped: Tensor
    refused: frozenset[str]


def exercise(block: Block, asked: Iterable[Call], truth: Truth, excused: Container[str] = ()) -> Answers:
    """Ask a block everything; raises :class:`Misconduct`. It may refuse the calls named in ``excused``."""
    refused: set[str] = set()
    kept: list[tuple[Call, Tensor, Tensor]] = []
    for call in asked:
        try:
            y = ask(block, call)
        except Refused:
            if call.name not in excused:
                raise
            refused.add(call.name)
            continue
        kept.append((call, y, _bits(y)))
    for call, y, copy in kept:
        if not torch.equal(_bits(y), copy):
            raise Misconduct(f"wrote over the output that it had returned for {call.name}")
    heard = [call for call, _, _ in kept]
    answers = [torch.cat([y for _, y, _ in kept])] if kept else []
    for call in heard[1:2]:
        again = replace(call, name=f"{call.name}, asked again in inference mode")
        with torch.inference_mode():
            answers.append(ask(block, again))
        heard.append(again)
    return _judged(heard, torch.cat(answers), truth, frozenset(refused)) if kept else _silent(truth, refused)


def _silent(truth: Truth, refused: Iterable[str]) -> Answers:
    """Of a block that answered nothing."""
    nothing = [0.0] * len(FAMILIES), [""] * len(FAMILIES)
    return Answers(*nothing, torch.zeros_like(truth.family, dtype=torch.bool), frozenset(refused))


def _judged(heard: Sequence[Call], y: Tensor, truth: Truth, refused: frozenset[str]) -> Answers:
    """How far the outputs ``y`` of all calls in turn are from the truth: at once, since on a GPU one takes as long."""
    families, tokens = len(FAMILIES), torch.cat([call.tokens for call in heard])
    parts = [truth.distance(*part) for part in zip(y.split(_TOGETHER), tokens.split(_TOGETHER), strict=True)]
    distance, other = (torch.cat(each) for each in zip(*parts, strict=True))
    sizes = torch.tensor([len(call.tokens) for call in heard], device=tokens.device)
    place = torch.arange(len(heard), device=tokens.device).repeat_interleave(sizes, output_size=len(tokens))
    worst = distance.new_zeros(len(heard) * families)
    worst = worst.scatter_reduce(0, place * families + truth.family[tokens], distance, "amax")
    columns = worst.view(-1, families).T.tolist()
    flipped = torch.zeros_like(truth.family, dtype=torch.bool)
    flipped[tokens[other]] = True
    where = [heard[column.index(max(column))].name if max(column) > 0 else "" for column in columns]
    return Answers([max(column) for column in columns], where, flipped, refused)


def ask(block: Block, call: Call) -> Tensor:
    """The block's output [T, H] for a call, computed; raises :class:`Misconduct`, or :class:`DeviceError`."""
    before = _bits(call.x)
    try:
        with torch.no_grad():
            y = block(call.x)
        settle(call.x.device)
    except DeviceError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()
        raise Refused(f"raised {type(error).__name__} ({line[0] if line else ''}) on {call.name}") from error
    if not torch.equal(_bits(call.x), before):
        raise Misconduct(f"changed its input in place on {call.name}")
    if not isinstance(y, Tensor):
        raise Misconduct(f"returned a {type(y).__name__}, not a tensor, on {call.name}")
    for what in ("shape", "dtype", "device"):
        if getattr(y, what) != getattr(call.x, what):
            got, want = getattr(y, what), getattr(call.x, what)
            got, want = (tuple(got), tuple(want)) if what == "shape" else (got, want)
            raise Misconduct(f"returned {what} {got} for an input of {what} {want} on {call.name}")
    return y.reshape(-1, y.shape[-1])


def _bits(x: Tensor) -> Tensor:
    """A copy of the tensor's bits: equality of numbers would miss a NaN and the sign of a zero."""
    return x.contiguous().view(torch.uint8).clone()
