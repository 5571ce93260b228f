"""Where vLLM's experts are faster than this library's, by the same table, a block in an engine computes with those.

That depends on the number of tokens, so it is decided inside of the block's one operator. On that side of the crossover
the router is still this library's kernel, so that both sides choose alike; its experts go to vLLM's kernels, over the
same parameters, and the shared expert is two products of its own, added in the end. Quantised blocks cross to vLLM's
whole layer, router and shared expert included.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_surgery.kernels.arguments import SCHEMA as FOLDED_SCHEMA
from moe_surgery.kernels.arguments import Terms
from moe_surgery.kernels.choice import Choice, rows_for

NAME = "engine_moe"
SCHEMA = FOLDED_SCHEMA.replace("folded_moe", NAME)
"""The operator, as torch knows it; graphs that were compiled with another one can't be used."""

STORED_NAME = "engine_stored_moe"
STORED_SCHEMA = FOLDED_SCHEMA.replace("folded_moe(Tensor x, ", f"{STORED_NAME}(Tensor x, Tensor? logits, str layer, ")
"""The operator over quantised weights, or behind vLLM's router."""

_MEASURED = "silu"
"""The only activation that vLLM's experts were measured with."""


def crosses(terms: Terms, choice: Choice) -> bool:
    """Whether the block computes with vLLM's experts where the table has ``choice``."""
    return choice.slower and (terms.scaled or terms.activation == _MEASURED)


def sizes_to_ask(terms: Terms, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of tokens from which a block computes in another way: the proof asks it about as many."""
    rows, found = rows_for(terms, dtype), []
    ways = [(row.path, crosses(terms, row)) for row in rows]
    for at, row in enumerate(rows):
        if at and ways[at] != ways[at - 1]:
            found.append(row.tokens)
    return tuple(found)


def told(terms: Terms, dtype: torch.dtype) -> str | None:
    """What a plan says of the crossover, if there is one."""
    spans = ", ".join(_spans(terms, dtype))
    whose = "layer" if terms.scaled else "experts, which are faster there,"
    return f"vLLM's {whose} for {spans} tokens" if spans else None


def _spans(terms: Terms, dtype: torch.dtype) -> Iterator[str]:
    rows = rows_for(terms, dtype)
    start: int | None = None
    for row in rows:
        if crosses(terms, row) and start is None:
            start = row.tokens
        elif start is not None and not crosses(terms, row):
            yield f"{start} to {row.tokens - 1}" if row.tokens - 1 > start else str(start)
            start = None
    if start is not None:
        yield f"{start} and more"
