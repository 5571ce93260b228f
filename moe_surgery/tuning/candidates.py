"""Which tiles are worth trying: for every product of either path, those that were the fastest somewhere."""

from __future__ import annotations

from collections.abc import Iterator

from moe_surgery.kernels.arguments import BLOCK, Terms
from moe_surgery.kernels.choice import Tiles

PAIRS_UP_TO = 16
"""Above this many tokens the grouped path was never the slower one."""

_MANY = 192
_AT_ONCE, _EXPERTS_AT_ONCE = 1024, 128
"""From so many tokens on, and up to so many experts, logits are tried that are chosen from where they are computed."""

Products = dict[str, list[Tiles]]
"""Candidates by product: ``gate_up``, ``down``, ``logits`` and ``add``, where no tiles stand for the plain sum."""


def candidates(terms: Terms, tokens: int) -> Iterator[tuple[str, Products]]:
    """The paths that may serve ``tokens``, with what to try of each."""
    if tokens <= PAIRS_UP_TO:
        yield "pairs", _scaled(PAIRS) if terms.scaled else PAIRS
    if tokens >= 2:
        products = _grouped(tokens, tokens * terms.top_k / terms.experts)
        if tokens >= _AT_ONCE and terms.experts <= _EXPERTS_AT_ONCE:
            products["logits"] += _tiles("BT BK", (64, 64, 8, 4), (64, 128, 8, 3))
        yield "grouped", _scaled(products) if terms.scaled else {**products, "add": _sums(terms, tokens)}


def _scaled(products: Products) -> Products:
    """Those for weights in e4m3: a tile covers whole groups of columns, and its rows have one scale."""
    found = {"logits": products["logits"]}
    for name, rows in (("gate_up", "BI"), ("down", "BH")):
        tiles: dict[tuple[int, ...], Tiles] = {}
        for each in products[name]:
            if "BM" in each:  # a step of the product is a group, and a tile of the first one makes a group
                each = {**each, "BK": BLOCK, rows: BLOCK if name == "gate_up" else min(each[rows], BLOCK)}
            if each["BK"] % BLOCK == 0 and each[rows] <= BLOCK:
                tiles[tuple(each.values())] = each
        found[name] = list(tiles.values())
    return found


def _tiles(names: str, *rows: tuple[int, ...]) -> list[Tiles]:
    return [dict(zip([*names.split(), "num_warps", "num_stages"], row, strict=True)) for row in rows]


PAIRS: Products = {
    "logits": _tiles(
        "BR BK", (4, 1024, 4, 1), (1, 1024, 1, 1), (2, 1024, 2, 1), (2, 1024, 4, 1), (4, 512, 4, 1), (8, 512, 4, 1),
        (1, 1024, 4, 1), (2, 512, 4, 1), (1, 2048, 4, 1), (2, 2048, 4, 1), (4, 1024, 8, 1),
    ),
    "gate_up": _tiles(
        "BI BK", (8, 1024, 4, 1), (4, 1024, 4, 1), (4, 1024, 2, 1), (8, 512, 4, 3), (8, 512, 4, 1), (16, 512, 8, 1),
        (8, 1024, 8, 1), (16, 1024, 8, 1), (4, 512, 4, 1), (16, 256, 4, 3), (8, 256, 2, 3), (4, 512, 2, 3),
        (16, 256, 4, 4), (16, 256, 8, 3), (32, 256, 8, 3), (16, 128, 4, 4), (8, 256, 4, 3), (32, 128, 4, 3),
        (4, 2048, 4, 1), (4, 2048, 8, 1), (2, 2048, 4, 1), (2, 4096, 4, 1), (4, 4096, 8, 1), (2, 4096, 8, 1),
    ),
    "down": _tiles(
        "BH BK AHEAD", (8, 512, 1, 8, 1), (4, 512, 1, 8, 1), (4, 512, 1, 4, 1), (8, 128, 1, 8, 1), (2, 512, 1, 4, 1),
        (4, 128, 1, 4, 1), (8, 128, 1, 4, 1), (16, 128, 1, 8, 1), (4, 256, 1, 4, 1), (8, 256, 1, 8, 1),
        (2, 512, 1, 8, 1), (2, 256, 1, 4, 1), (2, 128, 1, 4, 1), (16, 128, 1, 4, 1), (8, 64, 1, 4, 1),
        (16, 64, 1, 4, 1), (8, 128, 1, 2, 1), (4, 128, 1, 2, 1), (4, 128, 3, 4, 1), (8, 128, 3, 4, 1),
        (4, 128, 2, 4, 1), (4, 128, 3, 2, 1), (2, 128, 3, 4, 1), (8, 128, 2, 4, 1), (4, 256, 2, 4, 1),
        (2, 256, 3, 4, 1), (8, 64, 3, 4, 1), (2, 128, 3, 2, 1),
    ),
}  # fmt: skip


def _grouped(tokens: int, per_expert: float) -> Products:
    """The candidates of the grouped path: rows of a block near the number of tokens that an expert gets."""
    if per_expert <= 16:
        up = [
            (16, i, k, w, s)
            for i, k, w, s in (
                (32, 128, 4, 3), (32, 128, 4, 4), (32, 64, 4, 5), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3),
                (16, 256, 4, 3), (16, 128, 4, 5), (32, 256, 4, 3), (32, 256, 8, 2), (64, 64, 8, 4), (128, 64, 8, 3),
                (32, 128, 8, 3), (16, 128, 2, 4), (16, 256, 2, 3), (64, 256, 8, 2),
                (32, 512, 4, 2), (32, 256, 4, 2), (16, 512, 4, 2),
            )
        ]  # fmt: skip
        down = [
            (16, h, k, w, s)
            for h, k, w, s in (
                (64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4), (32, 128, 4, 4), (64, 64, 4, 5),
                (128, 128, 8, 3), (64, 128, 8, 3), (32, 128, 2, 3), (128, 64, 8, 4), (256, 64, 8, 3), (32, 256, 4, 2),
                (64, 256, 8, 2), (16, 128, 4, 5), (128, 128, 4, 2), (32, 64, 4, 5), (64, 128, 2, 3),
            )
        ]  # fmt: skip
        if per_expert > 6:
            up += [(32, *row[1:]) for row in up[:8]]
            down += [(32, *row[1:]) for row in down[:8]]
    else:
        sizes = (32, 64) if per_expert <= 64 else (64, 128)
        up, down = [], []
        for m in sizes:
            up += [(m, 64, 64, 4, 3), (m, 64, 64, 4, 4), (m, 128, 64, 8, 3), (m, 128, 64, 8, 4), (m, 64, 64, 8, 3)]
            up += [(m, 64, 128, 4, 2), (m, 32, 128, 4, 3), (m, 64, 128, 8, 2), (m, 128, 64, 4, 3)]
            down += [(m, 128, 64, 4, 3), (m, 128, 64, 4, 4), (m, 256, 64, 8, 3), (m, 256, 64, 8, 4), (m, 128, 64, 8, 3)]
            down += [(m, 128, 128, 4, 2), (m, 64, 128, 4, 3), (m, 128, 128, 8, 2), (m, 64, 64, 4, 4)]
    logits = [(16, 16, 128, 4, 3), (16, 32, 128, 4, 3), (16, 16, 256, 4, 2), (32, 32, 128, 4, 3), (64, 64, 64, 4, 3)]
    logits += [(64, 32, 128, 4, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4)] if tokens > 128 else []
    few = PAIRS["logits"][:8] if tokens <= 64 else []
    return {
        "logits": _tiles("BT BR BK", *logits) + few,
        "gate_up": _tiles("BM BI BK", *up),
        "down": _tiles("BM BH BK", *down),
    }


def _sums(terms: Terms, tokens: int) -> list[Tiles]:
    """The candidates of the last kernel; that with the shared expert's product needs many tokens to fill a GPU."""
    shared = [(64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]
    return [{}, *(_tiles("BM BH BK", *shared) if terms.slices and tokens >= _MANY else [])]
