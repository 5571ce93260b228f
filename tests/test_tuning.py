"""Tables of one's own: which shapes are tuned, and that a user's table comes before those that are shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folded_blocks import ROUTED, SPEC

from moe_surgery.errors import UsageError
from moe_surgery.kernels import choice
from moe_surgery.kernels.arguments import Terms
from moe_surgery.targets.folded.fold import terms_of
from moe_surgery.tuning.candidates import candidates
from moe_surgery.tuning.shapes import shapes, share

GPU = "Some GPU (80 GB)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's tables of a GPU are, on a machine that says it has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    found = choice.own_folder(GPU)
    found.mkdir(parents=True)
    choice.table.cache_clear()
    yield found
    choice.table.cache_clear()


def test_a_users_table_comes_before_the_librarys(folder: Path) -> None:
    assert folder.name == "Some-GPU-80-GB-"
    name = "H1024-E128-I384-K6-M2"
    own = choice.read_table(choice.FOLDER / f"{name}.json")
    (folder / f"{name}.json").write_text(json.dumps({"rows": [vars(own[0])]}))
    found = choice.table(name)
    assert [row.tokens for row in found] == [1] and vars(found[0]) == vars(own[0])
    choice.table.cache_clear()
    (folder / f"{name}.json").unlink()
    assert len(choice.table(name)) == len(own) > 1


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{"tokens": 1}]}', "missing the first"])
def test_a_table_that_is_none_is_named(folder: Path, text: str) -> None:
    path = folder / "H1.json"
    if text.startswith("missing"):
        rows = choice.read_table(choice.FOLDER / "default-16.json")
        text = json.dumps({"rows": [vars(row) for row in rows[1:]]})
    path.write_text(text)
    with pytest.raises(UsageError, match=r"H1\.json is no table of tiles .*; remove it, or run moe-surgery tune again"):
        choice.table("H1")


def test_equal_shapes_are_tuned_once_and_ranks_hold_their_share() -> None:
    other = replace(SPEC, router=replace(SPEC.router, renormalize=not SPEC.router.renormalize))
    (found,) = shapes([SPEC, other], "bfloat16")
    assert found.count == 2 and found.name == choice.shape_name(terms_of(SPEC))
    assert SPEC.shared is not None
    half = share(SPEC, 2)
    assert half.shared is not None
    assert (half.experts.width, half.shared.width) == (SPEC.experts.width // 2, SPEC.shared.width // 2)
    assert shapes([SPEC], "bfloat16", 2)[0].name == choice.shape_name(terms_of(half))
    with pytest.raises(UsageError, match="can't be shared by 5 ranks"):
        shapes([SPEC], "bfloat16", 5)


def test_shapes_in_e4m3_have_tables_of_their_own_and_are_made_of_whole_blocks() -> None:
    spec = replace(SPEC, hidden=256, experts=replace(SPEC.experts, width=128))
    assert spec.shared is not None
    spec = replace(spec, shared=replace(spec.shared, width=256))
    (found,) = shapes([spec], "bfloat16", scaled=True)
    assert found.name == shapes([spec], "bfloat16")[0].name + "-e4m3"
    with pytest.raises(UsageError, match="blocks of 128, of which 64 is no multiple"):
        shapes([spec], "bfloat16", 2, scaled=True)


@pytest.mark.parametrize("experts", [2, 8, 16, 64, 512])
def test_scales_by_row_have_tiles_for_few_tokens_and_are_slower_for_more(experts: int) -> None:
    choice.table.cache_clear()
    rows = choice.rows_for(Terms(experts, 2, 2, 1024, 384, "silu", scaled=True, by_row=True), torch.bfloat16)
    assert rows[0].tokens == 1 and [row.path for row in rows] == ["pairs"] * len(rows)
    assert [row.slower for row in rows] == [False] * (len(rows) - 1) + [True]


def test_what_is_chosen_outside_has_the_same_candidates_but_no_logits_of_its_own() -> None:
    spec = ROUTED["correction bias and groups"]
    (shape,) = shapes([spec], "bfloat16")
    assert shape.name.startswith(f"H{spec.hidden}-E{spec.experts.num_experts}-")
    for tokens, paths in ((1, ["pairs"]), (8, ["pairs", "grouped"]), (64, ["grouped"])):
        found = dict(candidates(terms_of(spec, given=True), tokens))
        assert list(found) == paths
        assert all({"logits", "gate_up", "down"} <= products.keys() for products in found.values())


@pytest.mark.parametrize("experts", [64, 128, 256, 512])
def test_only_where_experts_are_few_a_program_has_all_of_them(experts: int) -> None:
    """Neither what is tried nor what is taken of another shape asks for more registers than there are."""
    choice.table.cache_clear()
    terms = Terms(experts, 6, 2, 1024, 384, "silu", False, True, gated=True, native=True, scaled=True)
    rows = [row for row in choice.rows_for(terms, torch.bfloat16) if row.path == "grouped"]
    tried = dict(candidates(replace(terms, scaled=False), 4096))["grouped"]["logits"]
    assert all("BR" in row.logits for row in rows) == (experts > 128)
    assert all("BR" in tiles for tiles in tried) == (experts > 128)


def test_a_shape_without_a_table_takes_the_defaults_by_what_an_expert_gets() -> None:
    choice.table.cache_clear()
    default = choice.table("default-16")
    grouped = next(row.tokens for row in default if row.path == "grouped")
    as_they_are = Terms(128, 6, 0, 3000, 1500, "silu")
    same = choice.rows_for(as_they_are, torch.bfloat16)
    assert [vars(row) for row in same] == [vars(row) for row in default]
    doubled = choice.rows_for(replace(as_they_are, experts=256), torch.bfloat16)
    assert [row.tokens for row in doubled] == [n if n <= grouped else 2 * n for n in (row.tokens for row in default)]
    few = choice.rows_for(replace(as_they_are, experts=6), torch.bfloat16)  # every token visits every expert
    assert [row.tokens for row in few] == sorted({row.tokens for row in few}) and few[0].tokens == 1
    assert choice.serving(few, 8192).gate_up == default[-1].gate_up
