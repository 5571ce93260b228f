"""The check of the whole model: a short run before, with the old blocks, and one after, with the new ones in place.

The proof ends where a block ends. Here the model around the blocks is asked: does it call the new ones as it called
the old ones, and make the same of what they return? In the run before, everything that goes into and comes out of a
block, and what every module around one returns, is kept. The new block is held against the old one on those very
inputs. In the run after, a new block is called, but its output is replaced by what the old one had returned, so that
rounding doesn't add up from layer to layer, and nothing else may differ by more than the blocks' own measured noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_surgery.answers import Structure, output_of
from moe_surgery.calling import Calling, UnreadCall
from moe_surgery.interrupts import without_interrupts
from moe_surgery.models.short_run import Incomparable, NotRun, ShortRun, given_run, run_parts
from moe_surgery.operate.answers import copied, distance, form, kept, much
from moe_surgery.operate.inner_calls import InnerCalls
from moe_surgery.operate.watching import under, watched
from moe_surgery.prove.own_tokens import Heard
from moe_surgery.read.record.state import unwritten
from moe_surgery.report.outcomes import ModelCheck
from moe_surgery.targets.base import StandingBlock

_SMALL = 2**20  # elements


@dataclass(frozen=True, eq=False)
class _Event:
    """A site that was called, or a module around one that returned; with the tensors and plain values of it.

    ``tensors`` are those of a call that takes others beside the block's input, by role.
    """

    kind: Literal["called", "returned"]
    path: str
    values: tuple[Any, ...]
    answer: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Played:
    """One run before: the call, what happened in it, and what came out."""

    run: ShortRun
    events: tuple[_Event, ...]
    result: tuple[Any, ...]


@dataclass(eq=False)
class WholeModel:
    """The check of one operation on ``model``, whose ``sites`` are to be replaced.

    ``hidden`` is the width of the first site, ``callings`` how sites are called as they were read. ``given`` are
    arguments to call the model with; without them token ids are made up, and of a model that can't be called those
    parts are run that can.
    """

    model: nn.Module
    sites: Sequence[str]
    hidden: int
    given: Mapping[str, Any] | None = None
    callings: Mapping[str, Calling] = field(default_factory=dict)
    unread: dict[str, UnreadCall] = field(default_factory=dict)
    """Sites that the model calls otherwise than they were read, with the argument that it gives."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What they were called with there."""
    inner: InnerCalls = field(default_factory=InnerCalls)
    """What the model calls inside of sites, and not through them."""
    _played: list[_Played] = field(default_factory=list)
    _failed: list[NotRun] = field(default_factory=list)
    _seconds: float = 0.0
    _apart: float = 0.0

    def before(self) -> None:
        """Run the model as it is. What can't be run is told by :meth:`report`, and is no error."""
        if not self.sites:
            return
        with self._timed():
            if self.given is not None:
                error = self._play(given_run(self.model, self.given))
                if error is not None:
                    raise error
                return
            _, failed = run_parts(self.model, self.sites, self.hidden, self._play)
            self._failed += failed

    def heard(self, path: str, results: Structure | None) -> Iterator[Heard]:
        """Every call of the site at ``path`` in the run before. ``results`` tell the output in what it returned."""
        for played in self._played:
            for event in played.events:
                if event.kind == "called" and event.path == path:
                    given = [value for value in event.values if isinstance(value, Tensor)]
                    yield Heard(given, output_of(results, event.answer), event.tensors)

    def saw(self, apart: float) -> None:
        """Take down how far a new block was from the old one on its own tokens."""
        self._apart = max(self._apart, apart)

    def after(self, placed: Mapping[str, nn.Module], bound: float) -> str | None:
        """Run the model with the modules ``placed`` at the sites; the first difference, None if there is none.

        The sites that are not among ``placed`` hold their old blocks. ``bound`` is the noise of the blocks, relative.
        A module that returns None stands for a block that isn't there yet, and its answer isn't looked at.
        """
        with self._timed():
            for played in self._played:
                if any(under(path, played.run.path) for path in placed):
                    difference = self._compare(played, placed, bound)
                    if difference is not None:
                        return difference
        return None

    def report(self) -> ModelCheck:
        called = {event.path for played in self._played for event in played.events if event.kind == "called"}
        missing = tuple(site for site in self.sites if site not in called)
        return ModelCheck(
            parts=tuple(played.run.path for played in self._played),
            tokens=sum(played.run.tokens for played in self._played),
            not_run=tuple((part.path, part.reason) for part in self._failed),
            not_called=tuple(s for s in missing if not any(under(s, part.path) for part in self._failed)),
            apart=self._apart,
            seconds=self._seconds,
        )

    def _play(self, run: ShortRun) -> Exception | None:
        """One run with the old blocks. A result that isn't finite can't be compared, which is an error here too."""
        events: list[_Event] = []

        def called(path: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                values = kept((args, kwargs))
                tensors: dict[str, Tensor] = {}
                if path in self.callings:
                    try:
                        found = self.callings[path].taken(args, kwargs)
                        tensors = copied(found) if self.callings[path].companions else {}
                    except UnreadCall as error:
                        self.unread[path] = error
                        if values and isinstance(values[0], Tensor):
                            self.inputs[path] = values[0]
                with self.inner.through(path):
                    answer = inner(*args, **kwargs)
                events.append(_Event("called", path, values, copied(answer), tensors))
                return answer

            return forward

        def returned(path: str, output: Any) -> None:
            events.append(_Event("returned", path, kept(output)))

        try:
            sites = {path: self.model.get_submodule(path) for path in self.sites if under(path, run.path)}
            watching = watched(self.model, run.path, sites, called, returned)
            with unwritten(*sites.values()), _unchanged(self.model), self.inner.watching(sites), watching:
                result = kept(run())
        except Exception as error:
            return error
        floats = [value for value in result if isinstance(value, Tensor) and value.is_floating_point()]
        if not all(bool(value.isfinite().all()) for value in floats):
            return Incomparable("its output isn't finite, so nothing can be compared with it")
        self._played.append(_Played(run, tuple(events), result))
        return None

    def _compare(self, played: _Played, placed: Mapping[str, nn.Module], bound: float) -> str | None:
        wanted = iter(played.events)
        differences: list[str] = []
        inside: list[str] = []

        def meet(kind: str, path: str, values: tuple[Any, ...]) -> _Event | None:
            if differences:
                return None
            event = next(wanted, None)
            if event is None or (event.kind, event.path) != (kind, path):
                was = "nothing more happened" if event is None else f"{event.path} was {event.kind}"
                now = f"{path} is {kind}" if kind == "called" else f"{path or 'the model'} has returned"
                differences.append(
                    f"{now} where before {was}"
                    if event is None or event.kind == "called"
                    else f"{now} where before {event.path or 'the model'} had returned"
                )
                return None
            if (apart := distance(values, event.values)) > bound:
                what = "is given another input" if kind == "called" else "returns another output"
                differences.append(f"{path or 'the model'} {what} than before ({much(apart)})")
            return event

        def called(path: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                event = meet("called", path, kept((args, kwargs)))
                answer = inner(*args, **kwargs)
                if event is None:
                    return answer
                if answer is not None and form(answer) != form(event.answer):
                    differences.append(f"{path} returns {form(answer)} where before it returned {form(event.answer)}")
                return copied(event.answer)

            return forward

        def returned(path: str, output: Any) -> None:
            meet("returned", path, kept(output))

        sites = {path: self.model.get_submodule(path) for path in self.sites if under(path, played.run.path)}
        try:
            old = [module for path, module in sites.items() if path not in placed]
            watching = watched(self.model, played.run.path, {**sites, **placed}, called, returned, inside)
            with ExitStack() as stack:
                for new in placed.values():
                    if isinstance(new, StandingBlock):
                        stack.enter_context(new.unwritten())
                stack.enter_context(unwritten(*old))
                stack.enter_context(_unchanged(self.model))
                stack.enter_context(watching)
                result = kept(played.run())
        except Exception as error:
            if differences:
                return differences[0]
            where = inside[-1] if inside else played.run.path
            return f"{where or 'the model'} doesn't run with the new blocks in it: {type(error).__name__}: {error}"
        if differences:
            return differences[0]
        if (left := next(wanted, None)) is not None:
            return f"{left.path or 'the model'} isn't {left.kind} any more"
        if (apart := distance(result, played.result)) > bound:
            return f"{played.run.path or 'the model'} returns another output than before ({much(apart)})"
        return None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers hold what they held; large ones, which may be weights or caches, aren't copied."""
    small = [buffer for buffer in model.buffers() if buffer.numel() <= _SMALL and not buffer.is_meta]
    held = [buffer.detach().clone() for buffer in small]
    try:
        yield
    finally:
        with without_interrupts():
            for buffer, before in zip(small, held, strict=True):
                if not torch.equal(buffer, before):
                    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                        buffer.copy_(before)
