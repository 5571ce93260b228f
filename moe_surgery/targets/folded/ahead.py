"""Kernels compiled by other processes while a model on a GPU is read and run, so that its proofs wait less for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.fitness import missing

if TYPE_CHECKING:
    from moe_surgery.kernels.ahead import Compilers

_MOST = 8
"""Processes that compile; the kernels of a proof are some ten for each kind of block."""


class KernelsAhead(AbstractContextManager["KernelsAhead"]):
    """Processes that make themselves ready at once, if ``model`` is on a GPU that has kernels here. For ``with``."""

    def __init__(self, model: nn.Module) -> None:
        weight = next(model.parameters(), None)
        self._compilers: Compilers | None = None
        self._wait: Callable[[], None] | None = None
        if weight is not None and weight.is_cuda and not missing():
            from moe_surgery.kernels.ahead import Compilers

            self._compilers = Compilers(weight.device, min(_MOST, max(1, (os.cpu_count() or 1) // 2)))

    def begin(self, specs: Iterable[MoESpec], dtype: torch.dtype, numbers: Sequence[int]) -> None:
        """Begin to compile what folded blocks of ``specs`` need for calls of ``numbers`` of tokens; once at most."""
        if self._compilers is None:
            return
        from moe_surgery.targets.folded.fold import folded_terms

        terms = list(dict.fromkeys(folded_terms(spec, str(dtype).removeprefix("torch.")) for spec in specs))
        self._wait = self._compilers.begin(terms, dtype, numbers) if terms else None

    def wait(self) -> None:
        """Until all of it is compiled; but if no process is ready yet, it is as quick to compile it here."""
        if self._compilers is not None and self._compilers.underway and self._wait is not None:
            self._wait()
        self._end()

    def _end(self) -> None:
        if self._compilers is not None:
            self._compilers.end()
            self._compilers = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
