"""Where an engine's block crosses over to vLLM's experts: a matter of the tables, told in plans, asked in proofs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folded_blocks import SPEC

from moe_surgery.kernels import choice
from moe_surgery.kernels.arguments import Terms
from moe_surgery.targets.folded.fold import terms_of

pytest.importorskip("vllm")

TERMS = terms_of(SPEC)
ROWS = ((1, "pairs", 5.0, 9.0), (8, "grouped", 9.0, 8.0), (32, "grouped", 9.0, 8.9), (600, "grouped", 9.0, 8.0))


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table of SPEC's shape in which vLLM's experts take less for 8 to 31 tokens, and for 600 to 8999."""
    tiles: dict[str, Any] = {"logits": {}, "gate_up": {}, "down": {}}
    rows = [{"tokens": t, "path": path, "us": us, "vllm_us": vllm, **tiles} for t, path, us, vllm in ROWS]
    rows.append({"tokens": 700, "path": "grouped", "us": None, **tiles})  # not timed against vLLM
    rows.append({"tokens": 9000, "path": "grouped", "us": 1.0, "vllm_us": 1.0, **tiles})
    default = json.loads((choice.FOLDER / "default-16.json").read_text(encoding="utf-8"))
    for name, table in ((choice.shape_name(TERMS), {"rows": rows}), ("default-16", default), ("default-32", default)):
        (tmp_path / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    for cached in (choice.table, choice.choose):
        cached.cache_clear()
    yield
    for cached in (choice.table, choice.choose):
        cached.cache_clear()


def crossing(terms: Terms, tokens: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    from moe_surgery.engine.model.crossover import crosses

    return crosses(terms, choice.choose(terms, tokens, dtype))


def test_the_measured_times_decide() -> None:
    numbers = (1, 7, 8, 31, 32, 599, 600, 8999, 9000)
    assert [crossing(TERMS, n) for n in numbers] == [False, False, True, True, False, False, True, True, False]
    assert not crossing(TERMS, 8, torch.float32), "tables are for two-byte dtypes"
    assert not crossing(replace(TERMS, activation="gelu"), 8), "vLLM's experts were measured with silu"


def test_plans_tell_it_and_proofs_ask_both_sides() -> None:
    from moe_surgery.engine.model.crossover import sizes_to_ask, told

    said = told(TERMS, torch.bfloat16)
    assert said == "vLLM's experts, which are faster there, for 8 to 31, 600 to 8999 tokens"
    assert told(TERMS, torch.float32) is None
    asked = sizes_to_ask(TERMS, torch.bfloat16)
    assert asked == (8, 32, 600, 9000)


def test_quantised_blocks_cross_to_vllms_whole_layer() -> None:
    from moe_surgery.engine.model.crossover import sizes_to_ask, told

    stored = replace(TERMS, scaled=True, activation="gelu", given=True)  # as it is computed there, whatever that is
    (choice.FOLDER / f"{choice.shape_name(TERMS)}.json").rename(choice.FOLDER / f"{choice.shape_name(stored)}.json")
    assert [crossing(stored, n) for n in (7, 8, 31, 32, 600, 9000)] == [False, True, True, False, True, False]
    assert told(stored, torch.bfloat16) == "vLLM's layer for 8 to 31, 600 to 8999 tokens"
    rows = replace(stored, by_row=True)  # of which many tokens aren't computed here at all
    assert [crossing(rows, n) for n in (1, 7, 8, 32, 9000)] == [False, False, True, True, True]
    assert sizes_to_ask(rows, torch.bfloat16) == (8,)
    assert told(rows, torch.bfloat16) == "vLLM's layer for 8 and more tokens"


def test_a_block_that_is_wrong_for_many_tokens_alone_is_noticed() -> None:
    from spec_weights import weights

    from moe_surgery.prove.ground import survey
    from moe_surgery.prove.proof import prove_swapped
    from moe_surgery.targets import reference

    tensors = weights(SPEC, torch.float32)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = reference.forward(SPEC, tensors, x.reshape(-1, x.shape[-1])).view(x.shape)
        return y * 2 if x.numel() // x.shape[-1] == 600 else y

    ground = survey(SPEC, tensors, 0)
    assert prove_swapped(block, ground).passed
    verdict = prove_swapped(block, ground, sizes=(8, 600))
    assert not verdict.passed and "600 tokens in one sequence" in verdict.reason
