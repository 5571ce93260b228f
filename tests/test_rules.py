"""Rules held against readings: what matches, what doesn't, and what the trail says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_surgery.errors import ExpectationError
from moe_surgery.models.site import Site
from moe_surgery.packs.clauses import Case, Installed, Letters
from moe_surgery.packs.config_values import View
from moe_surgery.packs.file import load_pack, parse_pack
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Rule
from moe_surgery.read.reading import ChildShape, Reading
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.weights.layout import Layout, MLPPieces, Piece

RULES = Path(__file__).parent.parent / "rules"
TALKER, THINKER = load_pack(RULES / "qwen3_omni.toml").rules
(GENERIC,) = load_pack(RULES / "generic.toml").rules

MLP = MLPPieces(
    Piece("experts.gate_up_proj", 0, (0, 4)), Piece("experts.gate_up_proj", 0, (4, 8)), Piece("experts.down_proj", 0)
)
TALKER_READING = Reading(
    spec=MoESpec(
        hidden=16,
        router=RouterSpec(num_experts=8, top_k=3, scoring="softmax", renormalize=True),
        experts=ExpertsSpec(num_experts=8, width=4, activation="silu"),
        shared=SharedSpec(width=6, activation="silu", gate="sigmoid"),
    ),
    layout=Layout(Piece("gate.weight"), (MLP,)),
    combine="sigmoid(shared_expert_gate) * shared_expert + experts",
    children=(
        ("experts", ChildShape("experts", (8, 4, 16))),
        ("gate", ChildShape("matrix", (8, 16))),
        ("shared_expert", ChildShape("mlp", (6, 16))),
        ("shared_expert_gate", ChildShape("matrix", (1, 16))),
    ),
)
THINKER_READING = replace(
    TALKER_READING,
    spec=replace(TALKER_READING.spec, shared=None),
    combine="experts",
    children=TALKER_READING.children[:2],
)
TEXT = {
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "num_experts": 8,
    "hidden_size": 16,
    "moe_intermediate_size": 4,
    "hidden_act": "silu",
    "num_hidden_layers": 20,
}
TALKER_TEXT = {**TEXT, "model_type": "qwen3_omni_moe_talker_text", "shared_expert_intermediate_size": 6}
THINKER_TEXT = {**TEXT, "model_type": "qwen3_omni_moe_text", "num_hidden_layers": 48}
CONFIG = {
    "model_type": "qwen3_omni_moe",
    "enable_audio_output": True,
    "talker_config": {"text_config": TALKER_TEXT},
    "thinker_config": {"text_config": THINKER_TEXT},
}


class SomethingMoe(nn.Module):
    """A block's class; a rule sees only its name."""


def site(path: str = "talker.model.layers.3.mlp") -> Site:
    return Site(path, SomethingMoe())


def rule(text: str) -> Rule:
    """The rule of a pack that consists of ``find`` and other lines of one rule."""
    return parse_pack(f"pack = {{ name = 'p', version = '1' }}\n[[rule]]\nname = 'r'\n{text}".encode(), "p.toml").rules[
        0
    ]


def failed(result: Match | Miss) -> dict[str, str]:
    """Clause -> what was measured, of the clauses that did not hold."""
    return {clue.clause: clue.measured for clue in result.trail if not clue.held}


def test_the_talker_rule_matches_the_talker() -> None:
    found = TALKER.match(site(), TALKER_READING, CONFIG)
    assert isinstance(found, Match), found.reason
    assert found.rule == "qwen3-omni/talker"
    assert dict(found.letters) == {"E": 8, "H": 16, "I": 4, "S": 6}
    assert all(clue.held for clue in found.trail)
    assert [clue.clause for clue in found.trail] == [
        "path", "config", "model_type",
        "children.gate", "children.experts", "children.shared_expert", "children.shared_expert_gate", "children",
        "combine",
        "read.scoring", "read.top_k", "read.renormalize", "read.num_experts", "read.hidden", "read.width",
        "read.activation", "read.shared_width",
        "requires.transformers",
    ]  # fmt: skip
    assert THINKER.match(site("thinker.model.layers.0.mlp"), THINKER_READING, CONFIG)


def test_a_miss_is_falsy_and_runs_every_clause() -> None:
    found = THINKER.match(site(), TALKER_READING, CONFIG)
    assert not found
    assert isinstance(found, Miss)
    assert set(failed(found)) == {"path", "children", "combine"}
    assert failed(found)["children"] == "also shared_expert (mlp 6 16), shared_expert_gate (1 16)"
    assert "✗ combine: wanted experts, measured sigmoid(shared_expert_gate) * shared_expert + experts" in found.reason
    found = TALKER.match(site(), THINKER_READING, CONFIG)
    assert failed(found)["children.shared_expert"] == "no such child (there are: experts, gate)"
    assert failed(found)["read.shared_width"] == "no shared expert"


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (CONFIG, "talker.model.layers.0.mlp"),
        (CONFIG, "wrapped.talker.model.layers.0.mlp"),
        ({"text_config": TALKER_TEXT}, "model.layers.0.mlp"),
        (TALKER_TEXT, "layers.19.mlp"),
    ],
)
def test_the_talker_is_found_in_a_whole_model_and_alone(config: Any, path: str) -> None:
    assert TALKER.match(site(path), TALKER_READING, config)
    assert TALKER.expected(config) == 20


@pytest.mark.parametrize(
    "path",
    [
        "talker.code_predictor.model.layers.0.mlp",
        "thinker.model.layers.0.mlp",
        "talker.model.layers.0.mlp.experts",
        "code2wav.pre_transformer.layers.0.mlp",
    ],
)
def test_the_talker_rule_wants_the_talkers_path(path: str) -> None:
    assert failed(TALKER.match(site(path), TALKER_READING, CONFIG)) == {"path": path}


def spec(**changes: Any) -> Reading:
    """The talker's reading with one part of its spec changed."""
    return replace(TALKER_READING, spec=replace(TALKER_READING.spec, **changes))


SPEC = TALKER_READING.spec


@pytest.mark.parametrize(
    ("reading", "clause", "measured"),
    [
        (spec(router=replace(SPEC.router, top_k=4)), "read.top_k", "4"),
        (spec(router=replace(SPEC.router, renormalize=False)), "read.renormalize", "false"),
        (spec(router=replace(SPEC.router, scoring="sigmoid")), "read.scoring", "sigmoid"),
        (spec(experts=replace(SPEC.experts, activation="gelu")), "read.activation", "gelu"),
        (spec(router=replace(SPEC.router, num_experts=7)), "read.num_experts",
         "7: E is 8 in gate and 7 in read.num_experts"),
        (spec(hidden=17), "read.hidden", "17: H is 16 in gate and 17 in read.hidden"),
        (replace(TALKER_READING, combine="experts + shared_expert"), "combine", "experts + shared_expert"),
        (replace(TALKER_READING, combine="experts @ what"), "combine", "experts @ what"),
    ],
)  # fmt: skip
def test_one_difference_is_one_clue(reading: Reading, clause: str, measured: str) -> None:
    assert failed(TALKER.match(site(), reading, CONFIG)) == {clause: measured}


def child(name: str, form: Any, *dims: int) -> Reading:
    """The talker's reading with one child of another shape."""
    children = {**dict(TALKER_READING.children), name: ChildShape(form, dims)}
    return replace(TALKER_READING, children=tuple(children.items()))


@pytest.mark.parametrize(
    ("reading", "clause", "measured"),
    [
        (child("experts", "experts", 7, 4, 16), "children.experts", "7 4 16: E is 8 in gate and 7 in experts"),
        (child("experts", "experts", 7, 4, 15), "children.experts",
         "7 4 15: E is 8 in gate and 7 in experts, H is 16 in gate and 15 in experts"),
        (child("shared_expert", "mlp", 6, 15), "children.shared_expert",
         "mlp 6 15: H is 16 in gate and 15 in shared_expert"),
        (child("shared_expert", "matrix", 6, 16), "children.shared_expert", "6 16 (matrix)"),
        (child("shared_expert_gate", "matrix", 2, 16), "children.shared_expert_gate", "2 16: 2 where 1 is wanted"),
        (child("norm", "matrix", 1, 16), "children", "also norm (1 16)"),
    ],
)  # fmt: skip
def test_shape_letters_unify_across_children(reading: Reading, clause: str, measured: str) -> None:
    assert failed(TALKER.match(site(), reading, CONFIG)) == {clause: measured}


def test_a_size_that_only_the_config_agrees_with_is_a_clash() -> None:
    """The router was read as 7 wide and the config says 7, but the children are 8 wide."""
    reading = spec(router=replace(SPEC.router, num_experts=7))
    wanted = {"read.num_experts": "7: E is 8 in gate and 7 in read.num_experts"}
    assert failed(TALKER.match(site(), reading, with_text(num_experts=7))) == wanted


def with_text(**changes: Any) -> dict[str, Any]:
    """CONFIG with keys of the talker's text config changed, or dropped where None."""
    text = {key: value for key, value in {**TALKER_TEXT, **changes}.items() if value is not None}
    return {**CONFIG, "talker_config": {"text_config": text}}


@pytest.mark.parametrize(
    ("config", "clause", "measured"),
    [
        (with_text(num_experts_per_tok=None), "read.top_k",
         "3; config has no key talker_config.text_config.num_experts_per_tok"),
        (with_text(num_experts=None), "read.num_experts",
         "8; config has no key talker_config.text_config.num_experts nor talker_config.text_config.num_local_experts"),
        (with_text(num_experts_per_tok=4), "read.top_k", "3"),
        (with_text(num_experts_per_tok="3"), "read.top_k", "3; the config's value must be an integer above 0"),
        (with_text(norm_topk_prob=1), "read.renormalize", "true; the config's value must be true or false"),
        (with_text(hidden_act="gelu"), "read.activation", "silu"),
        (with_text(shared_expert_intermediate_size=7), "read.shared_width", "6"),
        (with_text(model_type="other"), "model_type", "other"),
        (with_text(model_type=None), "model_type", "config has no key talker_config.text_config.model_type"),
    ],
)  # fmt: skip
def test_values_come_from_the_checkpoints_config(config: Any, clause: str, measured: str) -> None:
    assert failed(TALKER.match(site(), TALKER_READING, config)) == {clause: measured}


def test_the_wanted_value_names_its_key() -> None:
    found = TALKER.match(site(), TALKER_READING, with_text(num_experts_per_tok=4))
    assert "✗ read.top_k: wanted 4 (@num_experts_per_tok), measured 3" in found.reason  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [with_text(num_experts=None, num_local_experts=8), with_text(hidden_act="swish")])
def test_other_names_for_the_same_thing(config: Any) -> None:
    assert TALKER.match(site(), TALKER_READING, config)


def test_without_the_rules_part_of_the_config_nothing_is_guessed() -> None:
    narrow = rule("find.path = '**'\nconfig = ['x', 'y.z']\nread = { top_k = '@k', scoring = 'softmax' }")
    found = narrow.match(site(), TALKER_READING, {"k": 3, "y": {}})
    assert failed(found) == {
        "config": "config has no key x nor y.z",
        "read.top_k": "3; config has no key x nor y.z",
    }
    found = narrow.match(site(), TALKER_READING, None)
    assert failed(found) == {"config": "there is no config", "read.top_k": "3; there is no config"}


def test_a_transformers_config_and_its_dict_both_serve() -> None:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig

    config = Qwen3OmniMoeTalkerTextConfig(**{key: value for key, value in TALKER_TEXT.items() if key != "model_type"})
    for given in (config, config.to_dict(), json.loads(config.to_json_string())):
        assert TALKER.match(site("layers.0.mlp"), TALKER_READING, given)
        assert TALKER.expected(given) == 20


def test_real_blocks_match_their_rules_and_no_other() -> None:
    """What dataflow reads of transformers' own blocks, on the meta device, is what the pack says."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
        Qwen3OmniMoeTalkerTextConfig,
        Qwen3OmniMoeTextConfig,
    )

    from moe_surgery.read.block import read

    talker_text = {key: value for key, value in TALKER_TEXT.items() if key != "model_type"}
    thinker_text = {key: value for key, value in THINKER_TEXT.items() if key != "model_type"}
    with torch.device("meta"):
        talker = omni.Qwen3OmniMoeTalkerTextSparseMoeBlock(Qwen3OmniMoeTalkerTextConfig(**talker_text)).eval()
        thinker = omni.Qwen3OmniMoeThinkerTextSparseMoeBlock(Qwen3OmniMoeTextConfig(**thinker_text)).eval()
    talker_site, thinker_site = Site("talker.model.layers.0.mlp", talker), Site("thinker.model.layers.0.mlp", thinker)
    found = TALKER.match(talker_site, read(talker), CONFIG)
    assert isinstance(found, Match), found.reason
    assert dict(found.letters) == {"E": 8, "H": 16, "I": 4, "S": 6}
    found = THINKER.match(thinker_site, read(thinker), CONFIG)
    assert isinstance(found, Match), found.reason
    assert not TALKER.match(thinker_site, read(thinker), CONFIG)
    assert not THINKER.match(talker_site, read(talker), CONFIG)


def test_a_class_glob_narrows() -> None:
    assert rule("find = { path = '**', class = ['Other', 'Some*'] }").match(site(), TALKER_READING, None)
    found = rule("find = { path = '**', class = 'Other*' }").match(site(), TALKER_READING, None)
    assert failed(found) == {"class": "SomethingMoe"}


def test_literals_and_scale() -> None:
    text = "find.path = '**'\nread = { top_k = 3, renormalize = true, scale = 1, shared_scale = 1.0 }"
    assert rule(text).match(site(), TALKER_READING, None)
    found = rule(text.replace("scale = 1,", "scale = 2.5,")).match(site(), TALKER_READING, None)
    assert failed(found) == {"read.scale": "1.0"}


def test_releases_are_clauses() -> None:
    import transformers

    found = rule("find.path = '**'\nrequires.transformers = '<4'").match(site(), TALKER_READING, None)
    assert failed(found) == {"requires.transformers": transformers.__version__}
    assert rule("find.path = '**'\nrequires.transformers = '>=4'").match(site(), TALKER_READING, None)


def test_pre_releases_count_by_their_number_and_absent_packages_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prepared-5.1.dev0.dist-info").mkdir()
    (tmp_path / "prepared-5.1.dev0.dist-info" / "METADATA").write_text("Name: prepared\nVersion: 5.1.dev0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    case = Case(site(), TALKER_READING, View.of(None), Letters())
    assert Installed("prepared", ">=5").check(case).held
    assert not Installed("prepared", ">=5.1").check(case).held
    assert Installed("not-prepared", ">=5").check(case).measured == "not installed"


@pytest.mark.parametrize("reading", [TALKER_READING, THINKER_READING])
@pytest.mark.parametrize("config", [None, {}, CONFIG])
@pytest.mark.parametrize("path", ["", "mlp", "a.b.c"])
def test_the_generic_rule_matches_whatever_could_be_read(reading: Reading, config: Any, path: str) -> None:
    found = GENERIC.match(site(path), reading, config)
    assert isinstance(found, Match)
    assert found.rule == "generic/any"
    assert GENERIC.expected(config) is None


def test_expected_counts() -> None:
    assert TALKER.expected(CONFIG) == 20
    assert THINKER.expected(CONFIG) == 48
    assert rule("find.path = '**'\nexpect.count = 3").expected(None) == 3
    assert rule("find.path = '**'\nexpect.count = '@layers'").expected({"layers": 0}) == 0
    assert rule("find.path = '**'").expected(CONFIG) is None


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"model_type": "llama", "num_hidden_layers": 32},
        {"text_config": {"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 32}},
        {**CONFIG, "enable_audio_output": False},
    ],
)
def test_nothing_is_expected_of_models_that_the_rule_is_not_about(config: Any) -> None:
    assert TALKER.expected(config) is None


@pytest.mark.parametrize(
    ("count", "problem"),
    [(None, "config has no key talker_config.text_config.num_hidden_layers"), ("20", "'20'"), (-1, "-1")],
)
def test_a_count_that_cannot_be_read_is_an_error(count: Any, problem: str) -> None:
    with pytest.raises(ExpectationError) as caught:
        TALKER.expected(with_text(num_hidden_layers=count))
    assert problem in str(caught.value)
    assert "qwen3-omni/talker expects @num_hidden_layers sites" in str(caught.value)
    assert caught.value.exit_code == 11
