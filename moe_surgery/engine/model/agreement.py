"""The ranks that share every layer go on together or not at all.

A rank that stopped, or kept its model as it was, while another runs the operated one would leave that one waiting for
its part of a sum; some of vLLM's sums wait for ever. So all come together before every exchange of tensors and at the
end of every stage of a load, and tell each other where they are and how they fared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from moe_surgery.errors import SurgeryError

T = TypeVar("T")


class ElsewhereError(SurgeryError):
    """Another rank failed, and the message is what it said; or the ranks are not where they should meet."""


@dataclass(frozen=True)
class _Told:
    """What a rank says when it meets the others: where it is, or what it failed with."""

    place: str
    error: str | None
    exit_code: int


class Ranks:
    """The ranks of tensor parallelism in one load. Once one has failed, they meet once more, to part."""

    def __init__(self) -> None:
        self._failure: Exception | None = None

    @property
    def size(self) -> int:
        return int(get_tp_group().world_size)

    def meet(self, place: str) -> None:
        """Wait for all to come to ``place``.

        Raises :class:`ElsewhereError` on all of them if one has failed, with its exit code, or is somewhere else; and
        again whenever it is called after that, as what asks a block questions catches what it raises.
        """
        self.stand()
        self._failure = _found(self._exchange(_Told(place, None, 0)))
        self.stand()

    def stand(self) -> None:
        """Raise what one of them failed with, if one did."""
        if self._failure is not None:
            raise self._failure

    def fail(self, error: Exception) -> None:
        """Tell the others of an error, wherever they are to meet next, unless they know that all is over."""
        if self._failure is None:
            self._failure = error
            self._exchange(_Told("", f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1)))

    def part(self) -> None:
        """After a failure that all know of: wait until all have said what they have to say about it.

        The engine's front end ends the other ranks as soon as one raises.
        """
        self._failure = None  # its traceback holds the model that failed
        with suppress(Exception):  # a failed connection was the failure
            self._exchange(_Told("", None, 0))

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all ranks in one tensor."""
        self.meet(f"where tensors of shape {list(part.shape)} are put together")
        whole: Tensor = get_tp_group().all_gather(part.contiguous(), dim) if self.size > 1 else part
        return whole

    def tell(self, place: str, value: T) -> list[T]:
        """What each rank has for ``value``, in their order."""
        self.meet(f"at {place}")
        told: list[T] = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(told, value, group=get_tp_group().cpu_group)
        return told

    @contextmanager
    def summing(self, what: str) -> Iterator[None]:
        """While this lasts, they meet before each of vLLM's sums over all ranks; ``what`` is what is summed up."""
        group = get_tp_group()
        add_up = group.all_reduce

        def all_reduce(tensor: Tensor) -> Tensor:
            self.meet(f"at {what}, of shape {list(tensor.shape)}")
            return add_up(tensor)

        vars(group)["all_reduce"] = all_reduce
        try:
            yield
        finally:
            del vars(group)["all_reduce"]

    def _exchange(self, mine: _Told) -> list[_Told]:
        if self.size == 1:
            return [mine]
        group = get_tp_group()
        told: list[_Told] = [mine] * self.size
        torch.distributed.all_gather_object(told, mine, group=group.cpu_group)
        return told


def _found(told: list[_Told]) -> ElsewhereError | None:
    """What is wrong with what all ranks said."""
    for rank, other in enumerate(told):
        if other.error is not None:
            found = ElsewhereError(f"tensor-parallel rank {rank} failed: {other.error}")
            found.exit_code = other.exit_code
            return found
    if len({other.place for other in told}) == 1:
        return None
    places = ", ".join(f"rank {rank} is {other.place}" for rank, other in enumerate(told))
    return ElsewhereError(f"the tensor-parallel ranks went different ways: {places}")
