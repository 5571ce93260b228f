"""What explain proposes: with the edits carried out, the rule matches the site that it missed."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import moe_surgery
from moe_surgery.models.site import Site
from moe_surgery.packs.edits import Edit
from moe_surgery.packs.file import parse_pack
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack, Rule
from moe_surgery.read.reading import ChildShape, Reading
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.testing import build
from moe_surgery.weights.layout import Layout, MLPPieces, Piece


class SomeMoe(nn.Module):
    """A block's class; a rule sees only its name."""


SITE = Site("model.layers.3.mlp", SomeMoe())
READING = Reading(
    spec=MoESpec(
        hidden=16,
        router=RouterSpec(num_experts=8, top_k=3, scoring="softmax", renormalize=True, scale=2.5),
        experts=ExpertsSpec(num_experts=8, width=4, activation="gelu_tanh"),
        shared=SharedSpec(width=6, activation="silu", gate=None),
    ),
    layout=Layout(Piece("gate.weight"), (MLPPieces(Piece("a"), Piece("b"), Piece("c")),)),
    combine="shared_expert + experts",
    children=(
        ("experts", ChildShape("experts", (8, 4, 16))),
        ("gate", ChildShape("matrix", (8, 16))),
        ("shared_expert", ChildShape("mlp", (6, 16))),
    ),
)
CONFIG = {"model_type": "some", "top": 3, "act": "gelu_pytorch_tanh", "wide": 4, "text": {"model_type": "text"}}

# Every key of a rule with values of which at least one fits the site and some don't.
CHOICES: dict[str, list[Any]] = {
    "find.path": ["**.mlp", "encoder.*", ["a.b", "c.*"], "model.layers.3.mlp"],
    "find.class": ["*Moe", "Dense*", ["X", "Y"]],
    "config": [".", "text", "nowhere", ["nowhere", "text"]],
    "model_type": ["some", "text", "other*"],
    "find.children": [
        {"gate": "E H", "experts": "E I H", "shared_expert": "mlp S H"},
        {"gate": "E H", "experts": "E I H"},
        {"gate": "I H", "experts": "E 4 H", "shared_expert": "mlp S H"},
        {"gate": "H E", "experts": "E I H", "shared_expert": "mlp S H", "norm": "1 H"},
        {"gate": "E H", "experts": "mlp S H", "shared_expert": "E I H"},
    ],
    "find.combine": ["experts + shared_expert", "experts", "gate * experts", "2 * experts + shared_expert"],
    "read.top_k": [3, 4, "@top", "@wide", "@missing", "@/top"],
    "read.scoring": ["softmax", "sigmoid"],
    "read.renormalize": [True, False, "@top"],
    "read.scale": [2.5, 1.0],
    "read.width": [4, 5, "@wide", "@act"],
    "read.num_experts": [8, "@top"],
    "read.activation": ["gelu_tanh", "silu", "@act", "@model_type"],
    "read.shared_width": [6, 7],
    "read.logits_dtype": ["native", "float32"],
    "read.correction_bias": [False, True, "@top"],
    "read.groups": [1, 4, "@top"],
    "read.group_score": ["max", "@act"],
    "read.epsilon": [0.0, 1e-20],
    "read.soft_cap": [30.0, "@wide"],
    "read.limit": [7.0, "@missing"],
}


def rule(keys: dict[str, Any]) -> Rule:
    """The rule that holds these dotted keys."""
    data: dict[str, Any] = {"name": "r"}
    for key, value in keys.items():
        table, _, name = key.rpartition(".")
        (data.setdefault(table, {}) if table else data)[name] = value
    lines = ["[pack]", 'name = "p"', 'version = "1"', "[[rule]]"]
    from moe_surgery.packs.toml_text import pairs

    return parse_pack("\n".join([*lines, *pairs(data)]).encode(), "p.toml").rules[0]


def carried_out(keys: dict[str, Any], edits: tuple[Edit, ...]) -> dict[str, Any]:
    changed = dict(keys)
    for edit in edits:
        assert edit.install is None
        if edit.value is None:
            del changed[edit.key]
        else:
            changed[edit.key] = edit.value
    return changed


def drawn(data: st.DataObject) -> dict[str, Any]:
    names = data.draw(st.sets(st.sampled_from([key for key in CHOICES if key != "find.path"])))
    keys = {name: data.draw(st.sampled_from(CHOICES[name]), label=name) for name in ("find.path", *sorted(names))}
    if "find.children" in keys and "find.combine" in keys:  # a formula may only name children
        words = set(keys["find.combine"].replace("+", " ").replace("*", " ").split()) - {"2"}
        if not words <= set(keys["find.children"]):
            del keys["find.combine"]
    return keys


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([CONFIG, None, {"other": 1}]))
def test_with_the_edits_carried_out_the_rule_matches(data: st.DataObject, config: Any) -> None:
    keys = drawn(data)
    missed = rule(keys).match(SITE, READING, config)
    if isinstance(missed, Match):
        return
    edits = rule(keys).edits(missed, READING, config)
    assert edits
    failed = sum(not clue.held for clue in missed.trail)
    # A letter that a child takes for another size is seen at a fact: the children change beside it.
    assert len([edit for edit in edits if edit.key != "find.children"]) <= failed
    found = rule(carried_out(keys, edits)).match(SITE, READING, config)
    assert isinstance(found, Match), (keys, list(map(str, edits)), found.reason)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"find.path": "**.ffn"}, 'find.path = ["**.ffn", "model.layers.*.mlp"]'),
        ({"find.path": "**", "find.class": "Dense*"}, 'find.class = ["Dense*", "SomeMoe"]'),
        ({"find.path": "**", "read.top_k": "@wide"}, "read.top_k = 3  # or wide: 3 in the config"),
        ({"find.path": "**", "read.top_k": "@missing"}, "read.top_k = 3"),
        ({"find.path": "**", "read.renormalize": False}, "read.renormalize = true"),
        ({"find.path": "**", "find.combine": "experts"}, 'find.combine = "shared_expert + experts"'),
        (
            {"find.path": "**", "find.children": {"gate": "E H"}},
            'find.children = { experts = "E I H", gate = "E H", shared_expert = "mlp S H" }',
        ),
        ({"find.path": "**", "requires.transformers": ">=99"}, "install transformers>=99"),
    ],
)
def test_an_edit_is_a_line_of_the_pack(keys: dict[str, Any], line: str) -> None:
    missed = rule(keys).match(SITE, READING, CONFIG)
    assert isinstance(missed, Miss)
    assert [str(edit) for edit in rule(keys).edits(missed, READING, CONFIG)] == [line]


def test_what_was_read_of_a_shared_expert_that_is_not_there_has_to_go() -> None:
    alone = replace(READING, spec=replace(READING.spec, shared=None), children=READING.children[:2], combine="experts")
    keys = {"find.path": "**", "read.shared_width": 6}
    missed = rule(keys).match(SITE, alone, CONFIG)
    assert isinstance(missed, Miss)
    assert [str(edit) for edit in rule(keys).edits(missed, alone, CONFIG)] == ["remove read.shared_width"]


def test_a_rule_that_matches_has_no_edits() -> None:
    found = rule({"find.path": "**"}).match(SITE, READING, CONFIG)
    assert isinstance(found, Match)


def test_explanations_print_the_whole_finding() -> None:
    model, _ = build("qwen2_moe")
    keys = {"find.path": "**.mlp", "read.top_k": 3, "read.scoring": "softmax"}
    pack = Pack("mine", "1", "", (replace(rule(keys), pack="mine"),))
    found = moe_surgery.explain(model, "model.layers.0.mlp", packs=[pack])
    assert found.alike == ("model.layers.1.mlp",)
    assert str(found).splitlines() == [
        "model.layers.0.mlp  Qwen2MoeSparseMoeBlock",
        "computes  softmax top-2 of 8 renormalised · experts 64→32 silu · shared 64 silu, sigmoid gate",
        "ranks by  softmax scores in float32",
        "combines  experts + sigmoid(shared_expert_gate) * shared_expert",
        "children  gate 8 64 · experts 8 32 64 · shared_expert mlp 64 64 · shared_expert_gate 1 64",
        "alike     model.layers.1.mlp",
        "",
        "✗ mine/r: 1 of 3 clauses failed  p.toml:4",
        "├─ ✓ find",
        "│  └─ ✓ path     model.layers.0.mlp  (wanted **.mlp)",
        "└─ ✗ read",
        "   ├─ ✓ scoring  softmax",
        "   └─ ✗ top_k    wanted   3",
        "                 measured 2",
        "  it would match with this line:",
        "      read.top_k = 2",
        "",
        "model.layers.0.mlp is matched by no rule; the nearest is mine/r, which fails at read.top_k",
    ]


def test_lines_that_wrap_keep_the_tree_s_branches() -> None:
    model, _ = build("qwen2_moe")
    page = io.StringIO()
    pack = Pack(
        "mine", "1", "", (replace(rule({"find.path": ["**.mlp", "**.feed_forward"], "read.top_k": 2}), pack="mine"),)
    )
    explained = moe_surgery.explain(model, "model.layers.0.mlp", packs=[pack])
    explained.render(Console(file=page, width=44, color_system=None))
    lines = page.getvalue().splitlines()
    tree = lines[lines.index("├─ ✓ find") : lines.index("└─ ✓ read")]
    assert len(tree) > 2 and all(line[0] in "├│" for line in tree), tree
