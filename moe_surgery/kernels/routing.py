"""Launching a router: logits, then the choice; what comes out goes to the experts' kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moe_surgery.kernels import grouping, pairs, router
from moe_surgery.kernels.arguments import Routed, RouterTerms, tiles_for
from moe_surgery.kernels.choice import Tiles
from moe_surgery.kernels.compiled import Kernel, stream_for
from moe_surgery.kernels.launch import choosing


def run_router(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, gate: Tensor | None, terms: RouterTerms,
    logits_tiles: Tiles,
) -> Routed:  # fmt: skip
    """The experts of tokens ``x`` [T, H] and their weights, by the router ``weight`` [E, H].

    ``bias`` and ``correction`` are [E], ``gate`` [1, H] is the shared expert's. All are contiguous, weight and gate of
    one dtype. Ids are below E.
    """
    tokens, device = x.shape[0], x.device
    first, second = _kernels(terms, tuple(logits_tiles.items()), device, x.dtype, weight.dtype)
    apart = 0 if gate is None else (gate.data_ptr() - weight.data_ptr()) // weight.element_size()
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=device)
    stream = stream_for(x, x.data_ptr() | weight.data_ptr() | apart)
    if "BT" in logits_tiles:
        grid = (tiles_for(terms.rows, logits_tiles["BR"]), tiles_for(tokens, logits_tiles["BT"]), 1)
        counts = torch.empty(terms.experts, dtype=torch.int32, device=device)
        first(grid, stream, x, weight, apart, logits, counts, tokens)
    else:
        first((tiles_for(terms.rows, logits_tiles["BR"]), tokens, 1), stream, x, weight, apart, logits, logits)
    return _run_choice(second, logits, x, bias, correction, terms)


def run_choice(logits: Tensor, like: Tensor, terms: RouterTerms) -> Routed:
    """As :func:`run_router`, by ``logits`` [T, R] in float32, contiguous, that are rounded where the terms say so.

    ``like`` is of the block's dtype. There are no biases.
    """
    return _run_choice(_choice(terms, like.device, like.dtype), logits, like, None, None, terms)


def _run_choice(
    kernel: Kernel, logits: Tensor, x: Tensor, bias: Tensor | None, correction: Tensor | None, terms: RouterTerms
) -> Routed:
    tokens = logits.shape[0]
    ids = torch.empty(tokens, terms.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, terms.top_k + terms.slices, dtype=torch.float32, device=logits.device)
    both = [logits if each is None else each for each in (bias, correction)]
    stream = stream_for(x, both[0].data_ptr() | both[1].data_ptr() | x.data_ptr())
    kernel((tokens, 1, 1), stream, logits, x, *both, ids, weights, terms.scale, terms.shared_scale)
    return Routed(ids, weights)


@lru_cache(maxsize=1024)
def _kernels(
    terms: RouterTerms, logits_tiles: tuple[tuple[str, int], ...], device: torch.device, dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> tuple[Kernel, Kernel]:  # fmt: skip
    """Those of a router; each key has its own, since what they compile to depends on the dtypes."""
    dependent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return router_kernels(terms, dict(logits_tiles), dependent=dependent)


@lru_cache(maxsize=1024)
def _choice(terms: RouterTerms, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The second of them alone, after a kernel that says nothing of when the next may start."""
    return router_kernels(terms, {}, dependent=False)[1]


def router_kernels(terms: RouterTerms, logits_tiles: Tiles, *, dependent: bool) -> tuple[Kernel, Kernel]:
    """The kernels for logits and choice; ``dependent`` for GPUs that overlap launches."""
    experts, slots, groups, members = map(
        triton.next_power_of_2,
        (terms.experts, terms.top_k + terms.slices, terms.groups, terms.experts // terms.groups),
    )
    # With a bias, logits are rounded when it has been added.
    known: dict[str, Any] = {
        "R": terms.rows, "E": terms.experts, "K": terms.top_k, "M": terms.slices, "H": terms.hidden,
        "P": slots, "BE": experts, "CLEAR": 0,
        "NATIVE": terms.native and not terms.biased, "ROUND": terms.native and terms.biased,
        "GROUPS": terms.groups, "CHOSEN": terms.chosen, "GP": groups, "SP": members,
        "SCORING": terms.scoring, "BY_LOGITS": terms.by_logits, "CAP": terms.soft_cap, "BIAS": terms.biased,
        "CORRECTED": terms.corrected, "TOP2": terms.top2, "LOWEST": terms.lowest, "RENORMALIZE": terms.renormalize,
        "EPSILON": terms.epsilon, "FLOOR": terms.floor, "SQUARES": terms.squares, "GATED": terms.gated,
    }  # fmt: skip
    first = grouping.group_logits if "BT" in logits_tiles else pairs.pair_logits
    return (
        Kernel.of(first, known, logits_tiles, overlaps=dependent),
        Kernel.of(router.route, known, choosing(terms.experts), overlaps=dependent),
    )
