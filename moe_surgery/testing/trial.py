"""One trial: a model is operated on with some packs, and compared with itself before, after, and after the undoing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import moe_surgery
from moe_surgery.errors import SurgeryError
from moe_surgery.packs.pack import Pack
from moe_surgery.report.outcomes import Outcomes
from moe_surgery.report.report import Report

if TYPE_CHECKING:
    from moe_surgery.testing.families import Family

TOLERANCE = 1e-4
"""How far a float32 model's outputs may move, relative in L2.

Each block is proven to some 1e-6, the rounding of float32 sums; later layers may magnify that, and a wrong block moves
the outputs by percents.
"""


@dataclass(frozen=True, eq=False)
class Trial:
    """What came of one model.

    ``report`` is that of ``apply``, None if it failed without one. ``moved`` is the relative L2 distance of the
    model's outputs after the operation from those before. ``restored`` says whether ``undo``, or the failure's own
    rolling back, left the same modules, the same storages and bit for bit the same outputs. ``idle`` are the paths of
    new blocks that the model never called: of them the outputs say nothing. ``fault`` is the error that ``apply``
    raised.
    """

    report: Outcomes | None
    moved: float
    restored: bool
    idle: tuple[str, ...] = ()
    fault: Exception | None = None

    @property
    def right(self) -> bool:
        """Whether the model computed the same throughout, and was as before in the end. An error is neither."""
        return self.wrong is None

    @property
    def loud(self) -> bool:
        """Whether nothing was wrong on the quiet: right, or an error on purpose that left the model as it was."""
        return self._changed is None and (self.fault is None or isinstance(self.fault, SurgeryError))

    @property
    def wrong(self) -> str | None:
        """What went wrong, in a sentence; None if nothing did."""
        if self._changed is not None or self.fault is None:
            return self._changed
        unexpected = "" if isinstance(self.fault, SurgeryError) else f"unexpected {type(self.fault).__name__}: "
        return f"{unexpected}{self.fault}"

    @property
    def _changed(self) -> str | None:
        if not self.moved <= TOLERANCE:
            return f"outputs moved by {self.moved:.1e}, more than {TOLERANCE:.0e}"
        if self.idle:
            return f"{', '.join(self.idle)}: replaced, but the model didn't call the new block"
        return None if self.restored else "undo did not leave the model as it was"

    @property
    def exit_code(self) -> int:
        """0, or that of the first thing that went wrong."""
        if self._changed is not None:
            return 12
        return 0 if self.fault is None else getattr(self.fault, "exit_code", 1)


Outputs = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def attempt(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    outputs: Outputs,
    packs: Sequence[str | Path | Pack] | None = None,
    target: str = "auto",
    compile: bool = False,
) -> Trial:
    """Operate on ``model``, compare, and undo.

    Args:
        model: A module, in evaluation mode.
        inputs: The keyword arguments of one call of it.
        outputs: What the model computes for them, as one tensor: ``outputs`` or a function of your own.
        packs: As for ``plan``.
        target: As for ``plan``.
        compile: Whether the outputs after the operation are those of the model under ``torch.compile``.

    Returns:
        A trial: the ``report``, and how far the outputs were apart, or what went wrong.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> trial = moe_surgery.testing.attempt(
        ...     model, inputs, outputs=moe_surgery.testing.outputs, target="reference"
        ... )
        >>> len(trial.report.replaced)
        2
    """
    with one_thread():
        return _attempt(model, inputs, outputs, packs, target, compile)


def _attempt(
    model: nn.Module,
    inputs: Mapping[str, Any],
    outputs: Outputs,
    packs: Sequence[str | Path | Pack] | None,
    target: str,
    compile: bool,
) -> Trial:
    before, picture = outputs(model, inputs), _picture(model)
    applied: Report | None = None
    fault: Exception | None = None
    try:
        applied = moe_surgery.apply(model, packs=packs, target=target)
    except Exception as error:  # one family's failure must not hide what becomes of the others
        fault = error
    after, idle = _compiled(model, inputs, outputs) if compile else _watched(model, inputs, outputs, applied)
    moved = distance(after, before)
    report: Outcomes | None = applied
    if applied is not None and applied.transaction is not None:
        moe_surgery.undo(applied)
    elif isinstance(fault, SurgeryError):
        report = fault.report
    restored = _picture(model) == picture and torch.equal(outputs(model, inputs), before)
    return Trial(report, moved, restored, idle, fault)


def _compiled(model: nn.Module, inputs: Mapping[str, Any], outputs: Outputs) -> tuple[Tensor, tuple[str, ...]]:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="inductor", dynamic=False)
    return outputs(compiled, inputs), ()


def _watched(
    model: nn.Module, inputs: Mapping[str, Any], outputs: Outputs, report: Report | None
) -> tuple[Tensor, tuple[str, ...]]:
    """The outputs, and which of the new blocks were not called for them."""
    swaps = report.transaction.swaps if report is not None and report.transaction is not None else ()
    called: set[str] = set()
    hooks = [swap.new.register_forward_pre_hook(lambda *_, path=swap.path: called.add(path)) for swap in swaps]
    try:
        found = outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found, tuple(swap.path for swap in swaps if swap.path not in called)


def attempt_family(
    family: Family, setting: str, seed: int = 0, *, packs: Sequence[str | Path | Pack] | None = None, **how: Any
) -> Trial:
    """``attempt`` with the tiny model of a family; ``how`` are its other arguments."""
    from moe_surgery.testing.families import build, outputs

    model, inputs = build(family.name, setting, seed)
    return attempt(model, inputs, outputs=outputs, packs=packs, **how)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The relative L2 distance of ``found`` from ``wanted``; infinite if they differ in shape or one isn't finite."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return float("inf")
    return float((found - wanted).double().norm() / wanted.double().norm())


def typical_distance(found: Tensor, wanted: Tensor) -> float:
    """The median over tokens [..., H] of the relative distance: one that is routed the other way moves no median."""
    apart = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return float(apart.median())


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads cost tiny models more than they save; on a busy machine, waiting for each other, ten times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _picture(model: nn.Module) -> tuple[list[tuple[str, int]], list[tuple[str, int, int]]]:
    """The identity of every module, and address and version of every tensor, by name."""
    modules = [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]
