"""The small languages inside a pack: globs, formulas, config keys."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.packs.combine import Formula, FormulaError
from moe_surgery.packs.config_values import Absent, Key, KeyPathError, View, check_path, follow
from moe_surgery.packs.pattern import Pattern, PatternError

SEGMENTS = st.text("ab0", min_size=1, max_size=3)
PATHS = st.lists(SEGMENTS, max_size=5)
GLOB_SEGMENTS = st.one_of(
    st.just("*"),
    st.just("**"),
    st.text("ab0*?", min_size=1, max_size=4).filter(lambda part: "**" not in part),
)


def part_matches(glob: str, text: str) -> bool:
    """The reference: one segment, character by character."""
    if not glob:
        return not text
    if glob[0] == "*":
        return any(part_matches(glob[1:], text[cut:]) for cut in range(len(text) + 1))
    return bool(text) and glob[0] in ("?", text[0]) and part_matches(glob[1:], text[1:])


def glob_matches(glob: list[str], path: list[str]) -> bool:
    """The reference: segment by segment, ``**`` as any number of them."""
    if not glob:
        return not path
    if glob[0] == "**":
        return any(glob_matches(glob[1:], path[cut:]) for cut in range(len(path) + 1))
    return bool(path) and part_matches(glob[0], path[0]) and glob_matches(glob[1:], path[1:])


@given(st.lists(GLOB_SEGMENTS, min_size=1, max_size=5), PATHS)
def test_globs_agree_with_the_reference(glob: list[str], path: list[str]) -> None:
    assert Pattern(".".join(glob)).matches(".".join(path)) == glob_matches(glob, path)


@given(PATHS.filter(bool), st.data())
def test_a_path_with_parts_starred_is_matched(path: list[str], data: st.DataObject) -> None:
    """The property above is mostly about misses; this one makes hits."""
    glob = [data.draw(st.sampled_from([part, "*", part[0] + "*", "**"])) for part in path]
    assert Pattern(".".join(glob)).matches(".".join(path))


@pytest.mark.parametrize(
    ("glob", "path", "wanted"),
    [
        ("**.layers.*.mlp", "layers.0.mlp", True),
        ("**.layers.*.mlp", "talker.model.layers.12.mlp", True),
        ("**.layers.*.mlp", "talker.model.layers.12.mlp.experts", False),
        ("**.layers.*.mlp", "talker.mylayers.12.mlp", False),
        ("layers.*.mlp", "model.layers.0.mlp", False),
        ("**", "", True),
        ("*", "", False),
        ("*", "mlp", True),
        ("*", "a.mlp", False),
        ("layers.1*.mlp", "layers.12.mlp", True),
        ("layers.1*.mlp", "layers.1.2.mlp", False),
        ("layers.?.mlp", "layers.12.mlp", False),
        (r"re:.*layers\.(3|5)\.mlp", "model.layers.5.mlp", True),
        (r"re:.*layers\.(3|5)\.mlp", "model.layers.5.mlp.experts", False),
    ],
)
def test_path_globs(glob: str, path: str, wanted: bool) -> None:
    assert Pattern(glob).matches(path) is wanted


def test_a_glob_of_a_name_covers_all_of_it() -> None:
    assert Pattern("*SparseMoe*", dotted=False).matches("Qwen2MoeSparseMoeBlock")
    assert not Pattern("SparseMoe*", dotted=False).matches("Qwen2MoeSparseMoeBlock")


EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(
            inner.map("(?:{})".format), st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}", "{,2}"])
        ).map("".join),
        inner.map("(?:^{}$)".format),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.text("ab.1", max_size=6))
def test_regular_expressions_agree_with_python(expression: str, text: str) -> None:
    assert Pattern(f"re:{expression}").matches(text) == (re.fullmatch(expression, text) is not None)


@pytest.mark.parametrize(
    "glob", ["re:(a+)+$", "re:(a|a)*b", "re:" + ".*" * 40 + "x", "*a" * 30 + "*b", ".".join(["**"] * 40)]
)
def test_no_pattern_takes_for_ever(glob: str) -> None:
    assert not Pattern(glob, dotted="*a" not in glob).matches(
        "a" * 300 + "!" if "." not in glob[3:] else "a." * 100 + "!."
    )


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("(?!talker).*", 'no lookaround, names or flags are known here, only "(?:" at column 2'),
        (r"(a)\1", "unexpected '\\\\1' at column 4"),
        ("((a{900}){900}){900}", "it has more than 1000 parts, repetitions counted"),
        ("((){999}){999}", "it has more than 1000 parts, repetitions counted"),
        ("(" * 490, "too deeply nested"),
        ("a{2,1}", "ends before it begins"),
        ("[z-a]", "bad character range z-a"),
        ("a)", 'unbalanced ")"'),
    ],
)
def test_what_isnt_known_of_regular_expressions_is_said(expression: str, problem: str) -> None:
    with pytest.raises(PatternError, match=re.escape(problem)):
        Pattern(f"re:{expression}")


@pytest.mark.parametrize(
    "text",
    ["", "a..b", ".a", "a.", "a**", "**a.b", "***", "layers.[0-9].mlp", "layers.{0..3}.mlp", "a b", "re:(", "re:*"],
)
def test_bad_patterns(text: str) -> None:
    with pytest.raises(PatternError):
        Pattern(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("experts + sigmoid(gate) * shared", "sigmoid(gate)*shared + experts"),
        ("experts + sigmoid(gate) * shared", "(experts) + (shared * sigmoid( gate ))"),
        ("2.5 * experts", "experts * 2.50"),
        ("2 * (a + b)", "b * 2 + 2 * a"),
        ("a + a", "2 * a"),
        ("0.1 * 3 * a", "0.3 * a"),
        ("1 * a", "a"),
        ("1e-1 * a", "0.1 * a"),
        ("sigmoid(a + b)", "sigmoid(b + a)"),
        ("0 * a + b", "b"),
    ],
)
def test_equal_formulas(one: str, other: str) -> None:
    assert Formula.parse(one) == Formula.parse(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("experts + shared", "experts"),
        ("experts + shared", "experts * shared"),
        ("experts + sigmoid(gate) * shared", "experts + gate * shared"),
        ("experts + sigmoid(gate) * shared", "experts + sigmoid(gate * shared)"),
        ("experts + sigmoid(gate) * shared", "sigmoid(gate) * (experts + shared)"),
        ("2 * a", "a"),
        ("sigmoid(2 * a)", "2 * sigmoid(a)"),
        ("a * a", "a"),
        ("a + 1", "a"),
    ],
)
def test_different_formulas(one: str, other: str) -> None:
    assert Formula.parse(one) != Formula.parse(other)


FORMULAS = st.recursive(
    st.sampled_from(["a", "b", "c.d", "2", "0.5"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"sigmoid({text})"),
    ),
    max_leaves=5,
)


@given(FORMULAS, FORMULAS)
def test_formulas_do_not_mind_order_and_read_back_what_they_print(a: str, b: str) -> None:
    for sign in "+*":
        assert Formula.parse(f"{a} {sign} {b}") == Formula.parse(f"{b} {sign} {a}")
    formula = Formula.parse(f"{a} + {b}")
    assert Formula.parse(str(formula)).canonical == formula.canonical


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 1, "must come here"),
        ("experts +", 10, "must come here"),
        ("experts - shared", 9, 'unexpected "-"'),
        ("experts shared", 9, 'unexpected "shared"'),
        ("a + relu(b)", 5, 'unknown function "relu"'),
        ("(a + b", 7, '")" is missing'),
        ("a + b)", 6, 'unexpected ")"'),
        ("2a", 2, 'unexpected "a"'),
        ("* a", 1, "must come here"),
        ("(" * 490 + "a", None, "nested"),
        ("(a+b+c)*(d+e+f)*(g+h+i)*(j+k+l)", None, "64 terms"),
    ],
)
def test_bad_formulas_name_the_column(text: str, column: int | None, problem: str) -> None:
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text)
    assert problem in str(caught.value)
    assert column is None or f"column {column}:" in str(caught.value)


CONFIG = {"a": 1, "text": {"a": 2, "none": None, "deep": {"x": 3}}, "off": False}


def test_keys_are_read_from_the_base_and_from_the_root() -> None:
    view = View.of(CONFIG, ("nowhere", "text", "."))
    assert view.base == "text"
    assert view.read(Key.parse("@a")) == 2
    assert view.read(Key.parse("@/a")) == 1
    assert view.read(Key.parse("@/text.deep.x")) == 3
    assert view.read(Key.parse("@deep.x")) == 3
    assert view.read(Key.parse("@b|a")) == 2
    assert view.read(Key.parse("@none")) is None


def test_an_absent_key_says_where_it_was_looked_for() -> None:
    assert str(View.of(CONFIG, ("text",)).read(Key.parse("@b|c"))) == "config has no key text.b nor text.c"
    assert str(View.of(CONFIG, ("text",)).read(Key.parse("@/b"))) == "config has no key b"
    assert str(View.of(CONFIG).read(Key.parse("@b"))) == "config has no key b"
    assert (
        str(View.of(CONFIG, ("x", "text.none", "a")).read(Key.parse("@b"))) == "config has no key x nor text.none nor a"
    )
    assert str(View.of(None).read(Key.parse("@b"))) == "there is no config"


def test_config_objects_are_read_by_attribute() -> None:
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(num_experts=6, architectures=["X"])
    assert follow(config, "num_experts") == 6
    assert isinstance(follow(config, "no_such_thing"), Absent)
    assert isinstance(follow(config, "to_dict"), Absent)
    assert isinstance(follow({"x": config}, "x.num_experts.real"), int)


@pytest.mark.parametrize("text", ["", "a", "@", "@/", "@a..b", "@a|", "@ a b", "@.", "@a-b"])
def test_bad_keys(text: str) -> None:
    with pytest.raises(KeyPathError):
        Key.parse(text)


@pytest.mark.parametrize("text", ["", "..", "a.", "@a", "a b"])
def test_bad_config_paths(text: str) -> None:
    with pytest.raises(KeyPathError):
        check_path(text)


@pytest.mark.parametrize("text", ["@a", "@a.b|c", "@/a"])
def test_keys_print_as_they_were_written(text: str) -> None:
    assert str(Key.parse(text)) == text
