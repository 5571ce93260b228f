"""That vLLM's routers choose experts which exist, whatever they are given.

Kernels that look experts up by what was chosen read other memory for a number that no expert has. vLLM's routers give
-1 for tokens that only fill a graph up, unless the forward pass doesn't say which those are; and a token's logits may
be no numbers, for which its kernels promise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available


@contextmanager
def all_chosen_for() -> Iterator[None]:
    """While this lasts, tokens that only fill a graph up are tokens like others to a router."""
    context: Any = get_forward_context() if is_forward_context_available() else None
    padding = getattr(context, "is_padding", None)
    if padding is None:
        yield
        return
    context.is_padding = None
    try:
        yield
    finally:
        context.is_padding = padding


def always_exist(router: Any, hidden: int, like: Tensor) -> bool:
    """Whether all that ``router`` chooses exists, by what it makes of logits [N, experts] that no token has.

    They are as ``like``, the logits [T, experts] of tokens; a token has ``hidden`` numbers. A bias that hides experts
    (one of minus infinity, or none that is a number) may leave none to choose, which one token's logits would show and
    another's wouldn't; so no is said of it, and of a router that maps its choices to others or tells someone of them.
    """
    bias = getattr(router, "e_score_correction_bias", None)
    hides = bias is not None and not bool(torch.isfinite(bias).all())
    if hides or router.eplb_state is not None or router.capture_fn is not None:
        return False
    logits = _logits(like.shape[-1], like.dtype).to(like.device)
    x = torch.zeros(len(logits), hidden, dtype=like.dtype, device=like.device)
    with all_chosen_for():
        _, ids = router.select_experts(hidden_states=x, router_logits=logits, topk_indices_dtype=torch.int32)
    return bool(((ids >= 0) & (ids < like.shape[-1])).all())


def _logits(experts: int, dtype: torch.dtype) -> Tensor:
    """Rows [N, experts] of what is no number, of either sign, of infinities, of ties, and of each among numbers."""
    generator = torch.Generator().manual_seed(0)
    nan, infinity, most = float("nan"), float("inf"), torch.finfo(dtype).max
    odd = [torch.tensor(value) for value in (nan, infinity, -infinity, 0.0, most, -most)]
    odd.append(torch.copysign(odd[0], torch.tensor(-1.0)))  # which another order of bits has elsewhere
    rows = [value.expand(experts) for value in odd]
    for value in odd:
        for share in (0.1, 0.5, 0.9):
            row = torch.randn(experts, generator=generator)
            rows.append(torch.where(torch.rand(experts, generator=generator) < share, value, row))
    return torch.stack(rows).to(dtype)
