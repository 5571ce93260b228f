"""The block as a registered operator, so that torch.compile and CUDA graphs take it as one opaque piece."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels.arguments import (
    ROUTE_SCHEMA,
    ROUTED_SCHEMA,
    SCHEMA,
    Routed,
    RouterTerms,
    Scales,
    Terms,
    Weights,
    by_row,
)
from moe_surgery.kernels.choice import choose, router_tiles
from moe_surgery.kernels.launch import run
from moe_surgery.kernels.routing import run_router

_LIBRARY = torch.library.Library("moe_surgery", "DEF")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
_LIBRARY.define(ROUTED_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
_LIBRARY.define(ROUTE_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))


def compute(x: Tensor, weights: Weights, terms: Terms, routed: Routed | None = None) -> Tensor:
    """``x`` [T, H], contiguous, to [T, H]; the number of tokens chooses path and tiles.

    ``routed`` has the experts of each token where the terms say that they are given.
    """
    tokens = x.shape[0]  # len() goes through Python
    if tokens == 0:
        return torch.empty_like(x)
    with _on(x.device):
        return run(x, weights, terms, choose(terms, tokens, x.dtype), routed)


def compute_routing(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, gate: Tensor | None, terms: RouterTerms
) -> Routed:
    """The experts of tokens ``x`` [T, H], contiguous, by the router ``weight`` [E, H]; see :func:`run_router`."""
    if len(x) == 0:
        return Routed(*_unrouted(x, terms.top_k, terms.slices))
    with _on(x.device):
        return run_router(x, weight, bias, correction, gate, terms, router_tiles(len(x), x.dtype))


def _unrouted(x: Tensor, top_k: int, slices: int) -> tuple[Tensor, Tensor]:
    ids = x.new_empty(len(x), top_k, dtype=torch.int32)
    return ids, x.new_empty(len(x), top_k + slices, dtype=torch.float32)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; changing it takes time, so only where it must."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=1024)
def _terms(*numbers: Any, **named: Any) -> Terms:
    """The same object for the same numbers: making one, and telling it from others, takes as long as a launch."""
    return Terms(*numbers, **named)


@lru_cache(maxsize=1024)
def _router_terms(*numbers: Any) -> RouterTerms:
    """As :func:`_terms`."""
    return RouterTerms(*numbers)


def gathered(
    router: Tensor, w13: Tensor, w2: Tensor, gate: Tensor | None, shared_gate: Tensor | None,
    shared_up: Tensor | None, shared_down: Tensor | None, scales: list[Tensor], top_k: int, activation: str,
    sigmoid: bool, renormalize: bool, scale: float, shared_scale: float, native: bool, by_sigmoid: bool,
) -> tuple[Weights, Terms]:  # fmt: skip
    """Weights and terms of the operator's arguments, which :func:`spread` made of them."""
    experts, hidden, width = w2.shape
    slices = 0 if shared_down is None else shared_down.shape[1] // width
    terms = _terms(
        experts, top_k, slices, hidden, width, activation, sigmoid, renormalize, scale, shared_scale, gate is not None,
        native, by_sigmoid, scaled=bool(scales), by_row=bool(scales) and by_row(w13, scales[0]),
    )  # fmt: skip
    held = Weights(router, w13, w2, gate, shared_gate, shared_up, shared_down, scales=scales_of(scales))
    return held, terms


def scales_of(held: list[Tensor]) -> Scales | None:
    """What :func:`listed` made a list of."""
    if not held:
        return None
    if len(held) == 4:
        held = [*held[:3], None, held[3]]  # type: ignore[list-item]
    return Scales(*held)


def listed(scales: Scales | None) -> list[Tensor]:
    """As an operator's argument."""
    return [] if scales is None else [each for each in scales if each is not None]


@lru_cache(maxsize=1024)
def given(terms: Terms) -> Terms:
    """Those of experts that were chosen outside, where ``scale`` and ``shared_scale`` are in their weights already."""
    return replace(terms, sigmoid=False, renormalize=False, native=False, by_sigmoid=False, given=True)


def spread(weights: Weights, terms: Terms) -> tuple[Any, ...]:
    """The arguments of an operator of the schema ``SCHEMA``, but for its input."""
    return (
        weights.router, weights.w13, weights.w2, weights.gate, weights.shared_gate, weights.shared_up,
        weights.shared_down, listed(weights.scales), terms.top_k, terms.activation, terms.sigmoid, terms.renormalize,
        terms.scale, terms.shared_scale, terms.native, terms.by_sigmoid,
    )  # fmt: skip


def _folded_moe(x: Tensor, *rest: Any) -> Tensor:
    return compute(x, *gathered(*rest))


def _routed_moe(
    x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None,
    shared_gate: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None, scales: list[Tensor],
    activation: str, up: bool, limit: float, limit_after: bool, alpha: float, offset: float, on_input: bool,
) -> Tensor:  # fmt: skip
    experts, hidden, width = w2.shape
    terms = _terms(
        experts, ids.shape[1], weights.shape[1] - ids.shape[1], hidden, width, activation, False, False, 1.0, 1.0,
        False, False, False, True, up, limit, limit_after, alpha, offset, on_input, w13_bias is not None, bool(scales),
        bool(scales) and by_row(w13, scales[0]),
    )  # fmt: skip
    held = Weights(w13, w13, w2, None, shared_gate, shared_up, shared_down, w13_bias, w2_bias, scales_of(scales))
    return compute(x, held, terms, Routed(ids, weights))


def _route(
    x: Tensor, router: Tensor, bias: Tensor | None, correction: Tensor | None, gate: Tensor | None, top_k: int,
    slices: int, scoring: str, by_logits: bool, native: bool, soft_cap: float, groups: int, chosen: int, top2: bool,
    lowest: bool, renormalize: bool, epsilon: float, floor: float, squares: bool, scale: float, shared_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    experts, hidden = router.shape
    terms = _router_terms(
        experts, top_k, slices, hidden, scoring, by_logits, native, soft_cap, groups, chosen, top2, lowest, renormalize,
        epsilon, floor, squares, scale, shared_scale, bias is not None, correction is not None, gate is not None,
    )  # fmt: skip
    return compute_routing(x, router, bias, correction, gate, terms)


def _fake_route(
    x: Tensor, router: Tensor, bias: Tensor | None, correction: Tensor | None, gate: Tensor | None, top_k: int,
    slices: int, *_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _unrouted(x, top_k, slices)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("folded_moe", _folded_moe, "CUDA")
_LIBRARY.impl("routed_moe", _routed_moe, "CUDA")
_LIBRARY.impl("route", _route, "CUDA")
torch.library.register_fake("moe_surgery::route", _fake_route, lib=_LIBRARY)
for _name in ("folded_moe", "routed_moe"):
    torch.library.register_fake(f"moe_surgery::{_name}", _fake, lib=_LIBRARY)


def folded_moe(x: Tensor, weights: Weights, terms: Terms) -> Tensor:
    """:func:`compute` as an operator, for where a graph is being traced; eagerly its dispatch can be saved."""
    result: Tensor = torch.ops.moe_surgery.folded_moe(x, *spread(weights, terms))
    return result


def routed_moe(x: Tensor, weights: Weights, terms: Terms, routed: Routed) -> Tensor:
    """:func:`compute` of experts that are given, as an operator."""
    result: Tensor = torch.ops.moe_surgery.routed_moe(
        x, routed.ids, routed.weights, weights.w13, weights.w2, weights.w13_bias, weights.w2_bias, weights.shared_gate,
        weights.shared_up, weights.shared_down, listed(weights.scales), terms.activation, terms.up, terms.limit,
        terms.limit_after, terms.alpha, terms.offset, terms.on_input,
    )  # fmt: skip
    return result


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, gate: Tensor | None, terms: RouterTerms
) -> Routed:
    """:func:`compute_routing` as an operator."""
    t = terms
    ids, weights = torch.ops.moe_surgery.route(
        x, weight, bias, correction, gate, t.top_k, t.slices, t.scoring, t.by_logits, t.native, t.soft_cap, t.groups,
        t.chosen, t.top2, t.lowest, t.renormalize, t.epsilon, t.floor, t.squares, t.scale, t.shared_scale,
    )  # fmt: skip
    return Routed(ids, weights)
