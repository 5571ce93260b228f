"""Folding paths: exact, stable, and in the form that shells expand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.report.folded_paths import fold_paths

NAMES = st.text(st.characters(categories=("L", "N"), include_characters="_-"), min_size=1, max_size=4)
PATHS = st.lists(st.integers(0, 130).map(str) | NAMES, min_size=1, max_size=5).map(".".join)


def expand(folded: str) -> list[str]:
    """What a folded path stands for, worked out apart from the code that folds."""

    def values(part: str) -> list[str]:
        if not part.startswith("{"):
            return [part]
        found: list[str] = []
        for piece in part[1:-1].split(","):
            first, *rest = piece.split("..")
            last, stride = (rest[0] if rest else first), int(rest[1]) if len(rest) > 1 else 1
            found += map(str, range(int(first), int(last) + 1, stride))
        return found

    # No dot outside braces is a part's own, and inside braces dots come in pairs.
    parts = folded.replace("..", "\0").split(".")
    return [".".join(path) for path in itertools.product(*(values(part.replace("\0", "..")) for part in parts))]


@pytest.mark.parametrize(
    ("paths", "folded"),
    [
        ([f"layers.{i}.mlp" for i in range(20)], [("layers.{0..19}.mlp", 20)]),
        ([f"m.{i}" for i in (0, 1, 2, 3, 5, 7, 8, 9)], [("m.{0..3,5,7..9}", 8)]),
        ([f"m.{i}.mlp" for i in range(1, 48, 2)], [("m.{1..47..2}.mlp", 24)]),
        (["m.3.mlp"], [("m.3.mlp", 1)]),
        (["m.3", "m.4"], [("m.{3,4}", 2)]),
        ([f"a.{i}.b.{j}" for i in range(3) for j in range(4)], [("a.{0..2}.b.{0..3}", 12)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], [("a.0.b.{0,1}", 2), ("a.1.b.0", 1)]),
        (["y.0", "x.0", "y.1"], [("y.{0,1}", 2), ("x.0", 1)]),
        (["m.01", "m.1", "m.²"], [("m.01", 1), ("m.1", 1), ("m.²", 1)]),
        ([""], [("", 1)]),
        ([], []),
    ],
)
def test_known_foldings(paths: list[str], folded: list[tuple[str, int]]) -> None:
    assert fold_paths(paths) == folded


@given(st.lists(PATHS, unique=True, max_size=60))
def test_every_path_is_covered_exactly_once(paths: list[str]) -> None:
    folded = fold_paths(paths)
    covered = [path for text, _ in folded for path in expand(text)]
    assert sorted(covered) == sorted(paths)
    assert [count for _, count in folded] == [len(expand(text)) for text, _ in folded]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), unique=True, max_size=40))
def test_two_varying_indices_are_covered_exactly_once(points: list[tuple[int, int]]) -> None:
    paths = [f"stacks.{a}.layers.{b}.mlp" for a, b in points]
    covered = [path for text, _ in fold_paths(paths) for path in expand(text)]
    assert sorted(covered) == sorted(paths)


@given(st.lists(PATHS, unique=True, min_size=1, max_size=30))
def test_the_order_is_that_of_the_first_path_of_each(paths: list[str]) -> None:
    firsts = [min(paths.index(path) for path in expand(text)) for text, _ in fold_paths(paths)]
    assert firsts == sorted(firsts)


def test_a_path_given_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"path occurs twice: a\.0"):
        fold_paths(["a.0", "a.1", "a.0"])
