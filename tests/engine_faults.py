"""What may go wrong in the middle of an operation, to be asked for by name; the rest of the process is as it is.

"NAME@RANK" goes wrong on that rank of tensor parallelism alone. vLLM's plugin mechanism brings it to every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

VARIABLE = "MOE_SURGERY_TEST_FAULT"
_LASTING = ExitStack()
TRUNCATED = "model.layers.1.mlp.experts.3.down_proj.weight"


def activate() -> None:
    """What vLLM calls in every process, of an engine whose fault is that of one rank."""
    if VARIABLE in os.environ:
        _LASTING.enter_context(faulty(os.environ[VARIABLE]))


def _fails_at(call: int, original: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``original``, raising at its ``call``-th call."""
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError(f"{what} broke")
        return original(*args, **kwargs)

    return function


def _on_rank(rank: int, faulty_one: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The faulty one on a rank of tensor parallelism, elsewhere the original."""
    from vllm.distributed import get_tensor_model_parallel_rank

    def function(*args: Any, **kwargs: Any) -> Any:
        chosen = faulty_one if get_tensor_model_parallel_rank() == rank else original
        return chosen(*args, **kwargs)

    return function


def _truncating(stream: Callable[..., Any]) -> Callable[..., Any]:
    """A ledger that is given half of one tensor."""

    def truncating(self: Any, weights: Any) -> Any:
        return stream(self, ((name, tensor[:64] if name == TRUNCATED else tensor) for name, tensor in weights))

    return truncating


def _unconvinced(prove: Callable[..., Any]) -> Callable[..., Any]:
    """A proof that fails, for once."""
    proofs = 0

    def unconvinced(*args: Any, **kwargs: Any) -> Any:
        nonlocal proofs
        proofs += 1
        verdict = prove(*args, **kwargs)
        return replace(verdict, passed=False, reason="the proof failed") if proofs == 2 else verdict

    return unconvinced


def _doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x: 2 * original(self, x)


def _exchanged(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, marlin, x, weights, ids: original(self, marlin, x, weights, ids.roll(1, -1).contiguous())


@contextmanager
def faulty(name: str | None) -> Iterator[None]:
    """While this lasts, something fails: reading a block, building, loading or proving one; or one is built wrong."""
    if name is None:
        yield
        return
    from moe_surgery.engine.model import blocks, few_tokens, ledger, proving, sites, surgery

    places: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
        "reading": (sites, "read", lambda original: _fails_at(1, original, "reading")),
        "building": (surgery, "build", lambda original: _fails_at(2, original, "building")),
        "planning": (surgery, "make_engine_plan", lambda original: _fails_at(1, original, "planning")),
        "truncated": (ledger.Ledger, "stream", _truncating),
        "asking": (blocks.EngineBlock, "forward", lambda original: _fails_at(3, original, "asking")),
        "proof": (proving, "prove_swapped", _unconvinced),
        "loading": (ledger.Ledger, "_note", lambda original: _fails_at(40, original, "loading")),
        "proving": (proving, "prove_swapped", lambda original: _fails_at(2, original, "proving")),
        "shared expert doubled": (blocks.SharedExpert, "forward", _doubled),
        "few tokens' experts exchanged": (few_tokens.FewTokensRunner, "_unsorted", _exchanged),
        "a stale layer": (surgery.LayerBook, "release", lambda original: lambda self, block: None),
    }
    what, _, rank = name.partition("@")
    holder, attribute, change = places[what]
    original = getattr(holder, attribute)
    changed = change(original)
    with patch.object(holder, attribute, _on_rank(int(rank), changed, original) if rank else changed):
        yield
