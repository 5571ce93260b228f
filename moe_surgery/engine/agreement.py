"""The ranks that share every layer go on together or not at all.

A rank that stopped, or kept its model as it was, while another runs the operated one would leave that one waiting for
its part of a sum. So all tell each other how they fared, at the same points of every load.
"""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group

from moe_surgery.errors import SurgeryError


class ElsewhereError(SurgeryError):
    """Another rank failed; the message is what it said."""


def agree(error: Exception | None) -> None:
    """Wait for all ranks of tensor parallelism to come here, with their ``error`` or None.

    Raises one's own error, else :class:`ElsewhereError` with the exit code of the first rank that has one.
    """
    group = get_tp_group()
    told: list[tuple[str, int] | None] = [None] * group.world_size
    mine = None if error is None else (f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1))
    if group.world_size > 1:
        torch.distributed.all_gather_object(told, mine, group=group.cpu_group)
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if other is not None:
            raise ElsewhereError(f"tensor-parallel rank {rank} failed: {other[0]}").with_code(other[1])
