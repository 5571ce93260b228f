"""Pack files: what they say is what is loaded, and every mistake is one error with file and line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_surgery.errors import PackError
from moe_surgery.packs.clauses import At, Installed, Reads
from moe_surgery.packs.config_values import Key
from moe_surgery.packs.facts import FACTS
from moe_surgery.packs.file import load_pack, parse_pack
from moe_surgery.packs.pack import Expect, Pack, Rule
from moe_surgery.packs.toml_lines import Path as KeyPath
from moe_surgery.packs.toml_lines import key_lines, line_of

RULES = Path(__file__).parent.parent / "rules"

GOOD = """\
[pack]
name = "mine"
version = "1"
summary = "a pack"

[[rule]]
name = "one"
summary = "a rule"
config = "text"
model_type = "my_*"

[rule.find]
path = "**.mlp"
class = ["*Moe*", "re:Mixture|Sparse"]
children = { gate = "E H", experts = "E I H", shared = "mlp S H" }
combine = "experts + 2.5 * shared"

[rule.read]
scoring = "softmax"
top_k = "@top_k|k"
renormalize = true
scale = 1.5

[rule.requires]
transformers = ">=5.0,<6"

[rule.expect]
count = "@layers"
unless_false = "@/talks"

[[rule]]
name = "two"
find.path = "**"
"""


def parse(text: str) -> Pack:
    return parse_pack(text.encode(), "p.toml")


def swap(old: str, new: str) -> str:
    """GOOD with one piece exchanged."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_a_pack_is_read_as_written() -> None:
    pack = parse(GOOD)
    assert (pack.name, pack.version, pack.summary, pack.last, pack.origin) == ("mine", "1", "a pack", False, "p.toml:1")
    one, two = pack.rules
    assert (one.full_name, one.origin, one.config, one.target) == ("mine/one", "p.toml:6", ("text",), None)
    assert (two.full_name, two.origin, two.config, two.summary) == ("mine/two", "p.toml:31", (), "")
    assert one.expect == Expect(Key(("layers",)), Key(("talks",), from_root=True))
    assert one.requires.releases == (Installed("transformers", ">=5.0,<6"),)
    assert Reads("top_k", Key(("top_k", "k"))) in one.clauses
    assert Reads("renormalize", True) in one.clauses
    assert [type(clause) for clause in two.clauses] == [At]


def test_rules_compare_by_what_they_say() -> None:
    assert parse(GOOD) == parse("# a comment\n\n" + GOOD)
    assert parse(GOOD) != parse(swap("scale = 1.5", "scale = 1.25"))
    assert hash(parse(GOOD).rules[0]) == hash(parse(GOOD).rules[0])


@pytest.mark.parametrize("text", [GOOD, *(path.read_text() for path in sorted(RULES.glob("*.toml")))])
def test_a_printed_pack_reads_back_equal(text: str) -> None:
    pack = parse(text)
    assert parse(pack.to_toml()) == pack
    assert tomllib.loads(pack.to_toml()) == pack.to_data()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 10**6), st.floats(0.001, 1000), st.booleans())
def test_odd_values_are_printed_so_that_they_read_back(text: str, count: int, scale: float, flag: bool) -> None:
    clauses = (*parse(GOOD).rules[1].clauses, Reads("renormalize", flag), Reads("scale", scale))
    pack = Pack("odd", text, text, (Rule("odd", "x", text, clauses, expect=Expect(count), target="vllm"),), last=flag)
    assert parse(pack.to_toml()) == pack


CASES: list[tuple[str, int, str]] = [
    # the file as TOML
    (swap('name = "mine"', 'name = "mine'), 2, "not TOML"),
    (swap('scale = 1.5', 'scale = '), 22, "not TOML"),
    (swap('scale = 1.5', 'top_k = 3'), 22, "not TOML"),
    (GOOD + "[rule.find]\npath = 'x'\n[rule.find]\n", 34, "not TOML"),
    (GOOD + 'find.combine = """experts\n', 34, "not TOML"),
    ("", 1, 'a pack file needs the key "pack"'),
    ("a = [" + "[" * 5000, 1, "not TOML"),
    # unknown keys, at every level
    (GOOD.replace("[[rule]]", "[[rules]]"), 6, 'unknown key "rules" in a pack file; did you mean "rule"?'),
    (swap('version = "1"', 'versoin = "1"'), 3, 'unknown key "versoin" in [pack]; did you mean "version"?'),
    (swap('config = "text"', 'base = "text"'), 9, 'unknown key "base" in [[rule]] (known: name, summary'),
    (swap('config = "text"', "config = 'text'\n'odd key' = 1"), 10, 'unknown key "odd key"'),
    (swap("class = [", "classes = ["), 14, 'unknown key "classes" in [rule.find]; did you mean "class"?'),
    (swap("top_k =", "topk ="), 20, 'unknown key "topk" in [rule.read]; did you mean "top_k"?'),
    (swap("transformers =", "transfomers ="), 25, 'unknown key "transfomers"'),
    (swap("count =", "cuont ="), 28, 'unknown key "cuont" in [rule.expect]; did you mean "count"?'),
    (swap('find.path = "**"', "find.path = '**'\nfind.shape = 'x'"), 34, 'unknown key "shape" in [rule.find]'),
    (swap('[rule.requires]', 'zz = 1\naa = 2\n[rule.requires]'), 24, 'unknown key "zz"'),
    # missing keys
    (swap('name = "mine"\n', ""), 1, '[pack] needs the key "name"'),
    (swap('name = "two"\n', ""), 31, '[[rule]] needs the key "name"'),
    (swap('find.path = "**"\n', ""), 31, '[[rule]] needs the key "find"'),
    (swap('path = "**.mlp"\n', ""), 12, '[rule.find] needs the key "path"'),
    (swap('count = "@layers"\n', ""), 27, '[rule.expect] needs the key "count"'),
    (GOOD[: GOOD.index("[[rule]]")], 1, 'a pack file needs the key "rule"'),
    # wrong types
    (swap('name = "mine"', "name = 3"), 2, "name must be a string, not the integer 3"),
    (swap('name = "mine"', 'name = "My Pack"'), 2, 'name "My Pack" must be lower-case'),
    (swap('version = "1"', "version = 1.5"), 3, "version must be a string, not the number 1.5"),
    (swap('summary = "a pack"', "last = 1"), 4, "last must be true or false, not the integer 1"),
    (swap('summary = "a rule"', "summary = [1]"), 8, "summary must be a string, not a list"),
    (swap('config = "text"', "config = [1]"), 9, "config must be a string or a list of strings"),
    (swap('config = "text"', "config = []"), 9, "config must not be an empty list"),
    (swap('model_type = "my_*"', "model_type = 2024-01-01"), 10, "model_type must be a string, not a date or time"),
    (swap('model_type = "my_*"', 'target = "nosuch"'), 10, "target: no target is named 'nosuch'"),
    (swap('model_type = "my_*"', "target = true"), 10, "target must be a string, not the boolean true"),
    (swap('find.path = "**"', 'find = "**"'), 33, "find must be a table, not a string"),
    (swap('find.path = "**"', "find.path = 1"), 33, "path must be a string or a list of strings"),
    (swap('gate = "E H"', "gate = 2"), 15, "gate must be a string, not the integer 2"),
    (swap('{ gate = "E H", experts = "E I H", shared = "mlp S H" }', '"E H"'), 15, "children must be a table"),
    (swap('{ gate = "E H", experts = "E I H", shared = "mlp S H" }', "{}"), 15, "children must name at least one"),
    (GOOD[: GOOD.rindex("[[rule]]")].replace("[[rule]]", "[rule]"), 6, "[[rule]] tables, not as a table"),
    ("pack = 1\n" + GOOD[GOOD.index("[[rule]]") :], 1, "pack must be a table, not the integer 1"),
    ("rule = []\n" + GOOD[: GOOD.index("[[rule]]")], 1, "[[rule]] tables, not as a list"),
    # wrong values
    (swap('path = "**.mlp"', 'path = "a..b"'), 13, "empty segment"),
    (swap('path = "**.mlp"', 'path = ["ok", "x**"]'), 13, "** must be a whole segment"),
    (swap('path = "**.mlp"', 'path = "re:(mlp"'), 13, 'regular expression "re:(mlp" doesn\'t compile: missing ")"'),
    (swap('"re:Mixture|Sparse"', '"re:*"'), 14, "class: regular expression"),
    (swap('model_type = "my_*"', 'model_type = "a.b"'), 10, "model_type: glob"),
    (swap('config = "text"', 'config = "a..b"'), 9, 'config: "a..b" is no config path'),
    (swap('gate = "E H"', 'gate = "E K"'), 15, 'gate: unknown shape letter "K" (known: E experts'),
    (swap('gate = "E H"', 'gate = "E"'), 15, 'gate: "E" is no shape'),
    (swap('gate = "E H"', 'gate = ""'), 15, 'gate: "" is no shape'),
    (swap('gate = "E H"', 'gate = "0 H"'), 15, 'gate: unknown shape letter "0"'),
    (swap('gate = "E H"', 'gate = "mpl S H"'), 15, 'gate: unknown shape letter "mpl"'),
    (swap('gate = "E H"', 'gate = "mlp E S H"'), 15, 'gate: "mlp E S H" is no shape'),
    (swap("experts + 2.5 * shared", "experts + + shared"), 16, "combine: formula"),
    (swap("experts + 2.5 * shared", "experts + tanh(shared)"), 16, 'unknown function "tanh"'),
    (swap("experts + 2.5 * shared", "expert + shared"), 16, 'not among the children; did you mean "experts"'),
    (swap('scoring = "softmax"', 'scoring = "sotfmax"'), 19, "scoring must be one of softmax, sigmoid, sqrtsoftplus"),
    (swap('"@top_k|k"', '"six"'), 20, 'top_k must be an integer above 0, or "@key" of the config; it is "six"'),
    (swap('"@top_k|k"', "true"), 20, "top_k must be an integer above 0"),
    (swap('"@top_k|k"', "6.0"), 20, "top_k must be an integer above 0"),
    (swap('"@top_k|k"', "-1"), 20, "top_k must be an integer above 0"),
    (swap('"@top_k|k"', '"@top k"'), 20, 'top_k: "@top k" is no config key'),
    (swap("renormalize = true", "renormalize = 1"), 21, "renormalize must be true or false"),
    (swap("scale = 1.5", "scale = nan"), 22, "scale must be a finite number"),
    (swap("scale = 1.5", "scale = { a = 1 }"), 22, "scale must be a finite number"),
    (swap(">=5.0,<6", "five"), 25, 'transformers: "five" is no version specifier'),
    (swap('transformers = ">=5.0,<6"', "transformers = 5"), 25, "transformers must be a string"),
    (swap('count = "@layers"', 'count = "20"'), 28, 'count: "20" is no config key'),
    (swap('count = "@layers"', "count = -1"), 28, "count must be an integer"),
    (swap('count = "@layers"', "count = true"), 28, "count must be an integer"),
    (swap('"@/talks"', '"talks"'), 29, 'unless_false: "talks" is no config key'),
    # what is too large
    (swap("experts + 2.5 * shared", f"experts * 0.{'0' * 100000}1"), 16, "a formula of 100013 characters"),
    (GOOD + "#" * 2**18, 1, "bytes; a pack has at most 262144"),
    (GOOD + ".".join(["a"] * 20000) + " = 1", GOOD.count("\n") + 1, "a name with more than 100 dots"),
    (swap('"@top_k|k"', "0x" + "f" * 5000), 20, "top_k is an integer of more than 64 bits"),
    (swap("scale = 1.5", "scale = 0x" + "f" * 5000), 22, "scale is an integer of more than 64 bits"),
    (swap('path = "**.mlp"', f'path = "{"a*" * 600}"'), 13, "a glob of 1200 characters"),
    (swap('"re:Mixture|Sparse"', f'"re:{"a" * 1000}"'), 14, "a regular expression of 1003 characters"),
    (swap("experts + 2.5 * shared", " * ".join(["experts"] * 5000)), 16, "a formula of 49997 characters"),
    (swap('gate = "E H"', f'gate = "{"K" * 5000}"'), 15, "K … "),
    (swap('name = "two"', 'name = "one"'), 32, 'a rule named "one" is already at p.toml:6'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message"), CASES)
def test_every_mistake_is_one_error_with_file_and_line(text: str, line: int, message: str) -> None:
    with pytest.raises(PackError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"p.toml:{line}: ")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"^p.toml:2: not UTF-8: byte 0xff"):
        parse_pack(b"[pack]\nname = '\xff'\n", "p.toml")
    with pytest.raises(PackError, match=r"none.toml:1: can't be read: No such file"):
        load_pack(tmp_path / "none.toml")


def test_windows_line_ends_count_as_one() -> None:
    with pytest.raises(PackError, match=r"^p.toml:20: "):
        parse(swap('"@top_k|k"', '"six"').replace("\n", "\r\n"))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_packs_are_read_or_refused_with_a_line(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(len(GOOD), start + 30)))
    middle = data.draw(st.text(st.sampled_from("[]{}=\"'.#,\n @*abEH1"), max_size=8))
    text = GOOD[:start] + middle + GOOD[end:]
    try:
        pack = parse(text)
    except PackError as error:
        file, line, _ = str(error).split(":", 2)
        assert file == "p.toml"
        assert 1 <= int(line) <= text.count("\n") + 1
    else:
        assert parse(pack.to_toml()) == pack


# ---- the line locator ----

TRICKY = """\
# [not.a.header]
top = "[[no]] = # header"
a.b . "c.d" = 1
'lit\\key' = 2
"esc\\u0041\\"" = [ # a comment with ] and "
  "]", 'it''s', { x = "}" }, # =
]
text = \"\"\"
[fake]
fake = 1 \\\"\"\"
""\"\"\"
raw = '''
[fake2] '' '\\'''' # y = 1
raw2 = '''a\\'''
inline = { k = { z = 1 }, q = [1, 2] }
[t . "u.v"] # c
x = 1
[[t.list]]
x = 1
[[t.list.sub]]
y.z = 1
[[t.list]]
[t.list.one]
w = 2024-01-01T00:00:00Z
"""


def paths_of(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    """Every key path in parsed TOML."""
    paths = {path} if path else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return paths.union(*(paths_of(item, (*path, key)) for key, item in items))


def test_lines_of_a_tricky_text() -> None:
    text = TRICKY.replace("'it''s'", "'its'")
    parsed, lines = tomllib.loads(text), key_lines(text)
    assert set(lines) <= paths_of(parsed)
    wanted = {
        ("top",): 2, ("a",): 3, ("a", "b"): 3, ("a", "b", "c.d"): 3, ("lit\\key",): 4, ('escA"',): 5, ("text",): 8,
        ("raw",): 12, ("raw2",): 14, ("inline",): 15, ("t",): 16, ("t", "u.v"): 16, ("t", "u.v", "x"): 17,
        ("t", "list"): 18, ("t", "list", 0): 18, ("t", "list", 0, "x"): 19, ("t", "list", 0, "sub"): 20,
        ("t", "list", 0, "sub", 0): 20, ("t", "list", 0, "sub", 0, "y"): 21, ("t", "list", 0, "sub", 0, "y", "z"): 21,
        ("t", "list", 1): 22, ("t", "list", 1, "one"): 23, ("t", "list", 1, "one", "w"): 24,
    }  # fmt: skip
    assert lines == wanted
    assert line_of(lines, ("inline", "k", "z")) == 15
    assert line_of(lines, ('escA"', 2, "x")) == 5
    assert line_of(lines, ("nowhere",)) == 1


KEYS = st.text("ab-_.[]=#'\"\\ é\n", min_size=1, max_size=4)
LEAVES = st.one_of(
    st.integers(), st.booleans(), st.text("ab[]={}#'\"\\\n ", max_size=12), st.lists(st.integers(), max_size=3)
)


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def written_value(data: st.DataObject, value: Any) -> str:
    """A value in one of the styles TOML has for it."""
    if isinstance(value, str) and data.draw(st.booleans()):
        body = value.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
        if not body.endswith('"') and not body.startswith("\n"):
            return f'"""{body}"""'
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        gap = data.draw(st.sampled_from([" ", "\n", " # ] [x]\n"]))
        return "[" + gap + f",{gap}".join(written_value(data, item) for item in value) + gap + "]"
    return str(value)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_lines_of_any_text(data: st.DataObject) -> None:
    """Writes a text statement by statement, noting the line of each key, and asks for the same notes back."""
    text, noted = "", {}
    taken: set[str] = set()

    def blank() -> str:
        return data.draw(st.sampled_from(["", "\n", "# [x]\n", '  # "\n\n']))

    def statements(path: KeyPath) -> str:
        nonlocal text
        for key, value in data.draw(st.dictionaries(KEYS, LEAVES, max_size=3)).items():
            text += blank()
            noted[(*path, key)] = text.count("\n") + 1
            text += f"{quoted(key)} = {written_value(data, value)}{data.draw(st.sampled_from(['', ' # = [']))}\n"
        return text

    statements(())
    taken |= {str(path[0]) for path in noted}
    for table in data.draw(st.lists(KEYS.filter(lambda key: key not in taken), unique=True, max_size=3)):
        repeats = data.draw(st.integers(0, 2))  # 0: a plain table
        for number in range(max(repeats, 1)):
            text += blank()
            path: KeyPath = (table, number) if repeats else (table,)
            noted[path] = text.count("\n") + 1
            noted.setdefault((table,), noted[path])
            text += f"[[ {quoted(table)} ]]\n" if repeats else f"[{quoted(table)}]\n"
            statements(path)
    parsed = tomllib.loads(text)
    lines = key_lines(text)
    assert lines == noted
    assert {path for path in paths_of(parsed) if not any(isinstance(part, int) for part in path)} >= {
        path for path in noted if not any(isinstance(part, int) for part in path)
    }


def test_the_table_of_facts_covers_the_spec() -> None:
    """A field added to the spec must be askable: the formula covers the gate on the shared expert."""
    from dataclasses import fields

    from moe_surgery.spec import ExpertsSpec, RouterSpec, SharedSpec

    asked = set(FACTS)
    assert {field.name for field in fields(RouterSpec)} <= asked
    assert {field.name for field in fields(ExpertsSpec)} <= asked
    assert {f"shared_{field.name}" for field in fields(SharedSpec)} - {"shared_gate"} <= asked
