"""Calling a model, or the parts of it that can be called, on a few tokens.

What a model takes is told by its forward's parameters and by its table of embeddings. Nothing is generated and no
processor is needed; a part that takes more than tokens, such as pixels, can't be called here.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_surgery.models.greedy import FED_BY_ANOTHER, without_a_trace

TOKENS = 8
_STRIDE = 7  # between token ids: some that differ, none of the first ones that may have a meaning of their own
_FIRST = 5


@dataclass(frozen=True, eq=False)
class ShortRun:
    """A call of a part of a model. ``path`` is the part's, "" for the whole; ``tokens`` how many it is given."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: int

    def __call__(self) -> Any:
        """The part's output. Leaves no hook, random number or gradient behind; raises what the part raises."""
        with _quietly(self.module):
            return self.module(*self.args, **self.kwargs)


@dataclass(frozen=True)
class NotRun:
    """A part with sites in it that could not be called, and why."""

    path: str
    reason: str


class Incomparable(Exception):
    """A run that gives nothing to compare; the message is why. Never leaves the library."""


Tried = Callable[[ShortRun], Exception | None]


def run_parts(model: nn.Module, sites: Sequence[str], hidden: int, run: Tried) -> tuple[list[ShortRun], list[NotRun]]:
    """Call ``run`` with calls of the largest parts that hold ``sites``, until one of each part succeeds.

    ``run`` makes the call and returns the exception if there is one. ``hidden`` is the width of a part's input that
    takes hidden states. Returns the calls that succeeded, and the parts that none did for.
    """
    done: list[ShortRun] = []
    failed: list[NotRun] = []

    def attempt(path: str) -> bool:
        module = model.get_submodule(path)
        reason = ""
        for call in _calls(path, module, hidden):
            error = run(call)
            if error is None:
                done.append(call)
                return True
            reason = reason or _first_line(error)
        inner = [child for child in _children(path, module) if any(_under(site, child) for site in sites)]
        reached = [attempt(child) for child in inner if _model_like(model.get_submodule(child))]
        if not reached:
            failed.append(NotRun(path, reason or _wanted(module)))
        return bool(reached)

    attempt("")
    return done, failed


def given_run(model: nn.Module, arguments: Mapping[str, Any]) -> ShortRun:
    """A call of the whole model with arguments that somebody recorded."""
    sizes = [value.shape for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
    return ShortRun("", model, (), arguments, sizes[0][0] * sizes[0][1] if sizes else 0)


def _children(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]


def _under(site: str, path: str) -> bool:
    return site.startswith(f"{path}.")


def _model_like(module: nn.Module) -> bool:
    """Whether tokens can be made up for a module: it has a table of embeddings, or a child that may have."""
    return _table(module) is not None


def _calls(path: str, module: nn.Module, hidden: int) -> Iterator[ShortRun]:
    """Calls that may suit a module, likeliest first."""
    table = _table(module)
    parameters = inspect.signature(module.forward).parameters
    plain = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    needed = [name for name, p in plain.items() if p.default is p.empty]
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return
    count = min(TOKENS, _positions(module))
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if table is not None:
        ids = ((_FIRST + _STRIDE * torch.arange(count, device=table.weight.device)) % table.num_embeddings)[None]
        fed = [name for name in FED_BY_ANOTHER if name in parameters]
        if "decoder_input_ids" in parameters:
            extra["decoder_input_ids"] = ids
        if fed and "inputs_embeds" in parameters:
            with torch.no_grad():
                embedded = table(ids)
            given = {"inputs_embeds": embedded, **{name: torch.zeros_like(embedded[:, :1]) for name in fed}}
            yield ShortRun(path, module, (), {**given, **extra}, count)
        if "input_ids" in parameters and not set(needed) - {"input_ids"}:
            yield ShortRun(path, module, (), {"input_ids": ids, **extra}, count)
        elif len(needed) == 1:
            yield ShortRun(path, module, (ids,), extra, count)
            yield ShortRun(path, module, (_states(count, hidden, weight),), extra, count)
        elif not needed and "input_ids" not in parameters and not fed:
            yield ShortRun(path, module, (), {"input_ids": ids}, count)
            yield ShortRun(path, module, (ids,), {}, count)
    elif len(needed) == 1:
        yield ShortRun(path, module, (_states(count, hidden, weight),), {}, count)


def _states(count: int, hidden: int, like: torch.Tensor) -> torch.Tensor:
    """Hidden states [1, count, hidden] of unit scale."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, count, hidden, generator=generator, device="cpu").to(like)


def _table(module: nn.Module) -> nn.Embedding | None:
    """The table of token embeddings: the one that the model names, else the first in its tree."""
    named = getattr(module, "get_input_embeddings", None)
    if callable(named):
        try:
            found = named()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Embedding):
            return found
    return next((each for each in module.modules() if isinstance(each, nn.Embedding)), None)


def _positions(module: nn.Module) -> int:
    """How many positions a model has at most, as its config says."""
    config = getattr(module, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else TOKENS


def _wanted(module: nn.Module) -> str:
    names = ", ".join(inspect.signature(module.forward).parameters)
    return f"its forward takes ({names}), which can't be made up"


def _first_line(error: Exception) -> str:
    if isinstance(error, Incomparable):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 160 else f"{lines[0][:160]}…"
    return f"called on a few tokens it raises {type(error).__name__}: {text}"


@contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Without gradients, compilation, and traces in the model or in random generators."""
    python = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=_devices(module)))
        stack.enter_context(without_a_trace(module))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.default_generator.manual_seed(0)
        for device in _devices(module):
            torch.cuda.default_generators[device].manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)


def _devices(module: nn.Module) -> list[int]:
    found = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    return sorted(found)
