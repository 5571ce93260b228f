"""Launching the kernels: scratch, grids, and the way from a :class:`Choice` to compile-time arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels import grouped, pairs
from moe_surgery.kernels.choice import Choice
from moe_surgery.kernels.terms import Terms, Weights


def run(x: Tensor, weights: Weights, terms: Terms, choice: Choice) -> Tensor:
    """The block's output [T, H] for tokens ``x`` [T, H], contiguous, in the weights' dtype, with T > 0.

    Only launches: nothing is copied to the host, so that a CUDA graph can record it.
    """
    return _pairs(x, weights, terms, choice) if choice.path == "pairs" else _grouped(x, weights, terms, choice)


def _pairs(x: Tensor, weights: Weights, terms: Terms, choice: Choice) -> Tensor:
    tokens, ranked = len(x), _power(terms.experts)
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=x.device)
    act = torch.empty(tokens * terms.pairs, terms.width, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    shared13, shared2 = weights.offsets()
    pdl = _dependent(x.device)
    one, two, three = choice.logits, choice.gate_up, choice.down
    pairs.pair_logits[_tiles(terms.rows, one["BR"]), tokens](
        x, weights.router, logits, logits, R=terms.rows, E=terms.experts, H=terms.hidden, NATIVE=terms.native, CLEAR=0,
        **one, **pdl,
    )  # fmt: skip
    pairs.pair_gate_up[tokens * _tiles(terms.width, two["BI"]), terms.pairs](
        x, logits, weights.w13, shared13, act, tokens, R=terms.rows, E=terms.experts, K=terms.top_k, M=terms.slices,
        H=terms.hidden, I=terms.width, ACT=terms.activation, SIGMOID=terms.sigmoid, BE=ranked,
        TOGETHER=tokens > 1 and two["BK"] >= terms.hidden, **two, **pdl,
    )  # fmt: skip
    pairs.pair_down[_tiles(terms.hidden, three["BH"]), tokens](
        act, logits, weights.w2, shared2, out, terms.scale, terms.shared_scale, R=terms.rows, E=terms.experts,
        K=terms.top_k, M=terms.slices, P=_power(terms.pairs), H=terms.hidden, I=terms.width, SIGMOID=terms.sigmoid,
        RENORMALIZE=terms.renormalize, GATED=terms.gated, BE=ranked, **three, **pdl,
    )  # fmt: skip
    return out


def _grouped(x: Tensor, weights: Weights, terms: Terms, choice: Choice) -> Tensor:
    tokens, ranked = len(x), _power(terms.experts)
    wide = terms.rows_dtype(tokens, x.dtype)
    logits = torch.empty(tokens, terms.rows, dtype=torch.float32, device=x.device)
    visits = torch.empty(tokens * terms.pairs, dtype=torch.float32, device=x.device)
    counts = torch.empty(terms.experts, dtype=torch.int32, device=x.device)
    lists = torch.empty(terms.experts, tokens, dtype=torch.int32, device=x.device)
    act = torch.empty(tokens * terms.pairs, terms.width, dtype=x.dtype, device=x.device)
    rows = torch.empty(tokens * terms.pairs, terms.hidden, dtype=wide, device=x.device)
    out = torch.empty_like(x)
    shared13, shared2 = weights.offsets()
    pdl = _dependent(x.device)
    one, two, three = choice.logits, choice.gate_up, choice.down
    sizes = {"E": terms.experts, "K": terms.top_k, "M": terms.slices, "H": terms.hidden, "I": terms.width}
    routing = {"R": terms.rows, "E": terms.experts, "H": terms.hidden, "NATIVE": terms.native}
    if "BT" in one:
        grouped.group_logits[_tiles(terms.rows, one["BR"]), _tiles(tokens, one["BT"])](
            x, weights.router, logits, counts, tokens, BE=ranked, **routing, **one, **pdl
        )
    else:
        pairs.pair_logits[_tiles(terms.rows, one["BR"]), tokens](
            x, weights.router, logits, counts, CLEAR=ranked, **routing, **one, **pdl
        )
    grouped.group_route[(tokens,)](
        logits, visits, counts, lists, tokens, terms.scale, terms.shared_scale, R=terms.rows, E=terms.experts,
        K=terms.top_k, M=terms.slices, P=_power(terms.pairs), SIGMOID=terms.sigmoid,
        RENORMALIZE=terms.renormalize, GATED=terms.gated, BE=ranked, **pdl,
    )  # fmt: skip
    grouped.group_gate_up[(_tiles(terms.width, two["BI"]) * row_blocks(terms, tokens, two["BM"]),)](
        x, weights.w13, shared13, act, counts, lists, tokens, BE=ranked, ACT=terms.activation, **sizes, **two, **pdl
    )
    grouped.group_down[(_tiles(terms.hidden, three["BH"]) * row_blocks(terms, tokens, three["BM"]),)](
        act, weights.w2, shared2, visits, rows, counts, lists, tokens, BE=ranked, **sizes, **three, **pdl
    )
    block = min(_power(terms.hidden), 1024)
    grouped.group_sum[tokens, _tiles(terms.hidden, block)](rows, out, P=terms.pairs, H=terms.hidden, BH=block, **pdl)
    return out


def row_blocks(terms: Terms, tokens: int, size: int) -> int:
    """No fewer blocks of ``size`` rows than any routing of ``tokens`` tokens fills."""
    visits = tokens * terms.top_k
    return visits // size + min(terms.experts, visits) + terms.slices * _tiles(tokens, size)


@cache
def _dependent(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch where the device has it."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, "launch_pdl": True} if able else {"PDL": False}


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
