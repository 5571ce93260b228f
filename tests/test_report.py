"""The report as text, JSON and picture, from constructed values."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from moe_surgery.errors import UsageError
from moe_surgery.planning.plan import Plan
from moe_surgery.prove.verdict import Mutant, Verdict
from moe_surgery.report import words
from moe_surgery.report.explanation import Explanation
from moe_surgery.report.figure import picture
from moe_surgery.report.files import write_whole
from moe_surgery.report.json import dumps, scan_data
from moe_surgery.report.outcomes import Memory, Step
from moe_surgery.report.report import Report
from moe_surgery.report.rows import rows
from moe_surgery.report.terminal import render, sentence
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.timing import blocks
from moe_surgery.timing.busy import Watch, busy_seconds

TALKER = MoESpec(
    1024, RouterSpec(128, 6, "softmax", True), ExpertsSpec(128, 384, "silu"), SharedSpec(768, "silu", "sigmoid")
)
THINKER = MoESpec(2048, RouterSpec(128, 8, "softmax", True), ExpertsSpec(128, 768, "silu"), None)
NORM = "a norm after the combine is not accounted for"
WIDTH = "width 704 is not a multiple of 128"


def verdict(error: float | None = 3.1e-3, margin: float = 6.83, *, passed: bool = True) -> Verdict:
    reason = "nearer than every mutant" if passed else f"margin {margin:.1f} is below 5"
    return Verdict(passed, reason, 1e-7, error, 1e-7, margin, (Mutant("one expert zeroed", 0.02),), 512, 3, 0)


def thinker(layer: int, **changes: Any) -> Step:
    path = f"thinker.model.layers.{layer}.mlp"
    step = Step(path, "ThinkerBlock", "replaced", "proven", "qwen3-omni/thinker", "fused", THINKER, verdict())
    return replace(step, **changes)


def talker(layer: int, **changes: Any) -> Step:
    path = f"talker.model.layers.{layer}.mlp"
    step = Step(path, "TalkerBlock", "replaced", "proven", "qwen3-omni/talker", "fused", TALKER, verdict())
    return replace(step, **changes)


def report(steps: Sequence[Step] | None = None, **changes: Any) -> Report:
    if steps is None:
        steps = [thinker(i) for i in range(6) if i not in (2, 3)]
        steps += [
            thinker(2, outcome="refused", reason=WIDTH, verdict=None),
            Step("thinker.model.layers.3.mlp", "OddBlock", "missed", NORM),
            *(talker(i) for i in range(20)),
        ]
    versions = {"torch": "2.13.0", "transformers": "5.19.0"}
    made = Report("org/some-model", "applied", tuple(steps), "7f3a", versions, 12.34, Memory(2**30, 2**20, 0))
    return made.but(**changes)


def text_of(made: Report, width: int = 120, **rest: Any) -> str:
    page = io.StringIO()
    render(made, Console(file=page, width=width, color_system=None), **rest)
    return page.getvalue()


def test_a_report_at_120_columns() -> None:
    assert text_of(report()) == (
        "org/some-model  torch 2.13.0 · transformers 5.19.0\n"
        "~ thinker.model.layers.{0,1,4,5}.mlp  ThinkerBlock → fused   ×4  rel 3.1e-3  margin 6.8×\n"
        "    softmax top-8 of 128 renormalised · experts 2048→768 silu · rule qwen3-omni/thinker\n"
        "! thinker.model.layers.2.mlp          ThinkerBlock → fused   ×1\n"
        "    softmax top-8 of 128 renormalised · experts 2048→768 silu · rule qwen3-omni/thinker\n"
        "    width 704 is not a multiple of 128\n"
        "? thinker.model.layers.3.mlp          OddBlock               ×1\n"
        "    a norm after the combine is not accounted for\n"
        "~ talker.model.layers.{0..19}.mlp     TalkerBlock → fused   ×20  rel 3.1e-3  margin 6.8×\n"
        "    softmax top-6 of 128 renormalised · experts 1024→384 silu · shared 768 silu, sigmoid gate"
        " · rule qwen3-omni/talker\n"
        "weights  1.0 GiB moved by reference · 1.0 MiB new · no originals kept\n"
        "24 replaced, 0 kept, 1 missed, 1 refused · 12.3 s\n"
    )


def test_a_report_at_60_columns_puts_the_kind_below_the_path() -> None:
    assert text_of(report([thinker(0), talker(0), talker(1)]), width=60) == (
        "org/some-model  torch 2.13.0 · transformers 5.19.0\n"
        "~ thinker.model.layers.0.mlp     ×1  rel 3.1e-3  margin 6.8×\n"
        "    ThinkerBlock → fused\n"
        "    softmax top-8 of 128 renormalised · experts 2048→768\n"
        "    silu · rule qwen3-omni/thinker\n"
        "~ talker.model.layers.{0,1}.mlp  ×2  rel 3.1e-3  margin 6.8×\n"
        "    TalkerBlock → fused\n"
        "    softmax top-6 of 128 renormalised · experts 1024→384\n"
        "    silu · shared 768 silu, sigmoid gate · rule\n"
        "    qwen3-omni/talker\n"
        "weights  1.0 GiB moved by reference · 1.0 MiB new · no\n"
        "         originals kept\n"
        "3 replaced, 0 kept, 0 missed, 0 refused · 12.3 s\n"
    )


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_console_or_ends_in_a_blank(width: int) -> None:
    lines = text_of(report(), width, notes=[("speed", "MoE block 1.9× faster " * 4)]).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    whole = "".join(text_of(report(), width).split())
    for wanted in (
        "thinker.model.layers.{0,1,4,5}.mlp",
        NORM,
        WIDTH,
        TALKER.sentence(),
        "rule qwen3-omni/talker",
        "margin 6.8×",
    ):
        assert "".join(wanted.split()) in whole


def test_notes_stand_before_the_last_line() -> None:
    lines = text_of(report(), notes=[("speed", "twice as fast")]).splitlines()
    assert lines[-2:] == ["speed    twice as fast", sentence(report())]


def test_rows_tell_nothing_of_time() -> None:
    slow, fast = report(seconds=1000.0), report(seconds=0.5)
    assert text_of(slow).splitlines()[:-1] == text_of(fast).splitlines()[:-1]
    assert text_of(slow).endswith("16 min 40 s\n")


def test_a_row_shows_the_worst_of_its_sites() -> None:
    steps = [talker(0), talker(1, verdict=verdict(9e-3, 50.0)), talker(2, verdict=verdict(1e-3, 5.1))]
    (row,) = rows(report(steps))
    assert (row.error, row.margin, row.paths) == (9e-3, 5.1, ("talker.model.layers.{0..2}.mlp",))


def test_proofs_that_failed_are_one_row_with_the_worst_reason() -> None:
    def failed(layer: int, margin: float) -> Step:
        found = verdict(0.02, margin, passed=False)
        return talker(layer, outcome="refused", reason=f"proof failed: {found.reason}", verdict=found)

    found = rows(report([failed(0, 3.0), failed(1, 1.2), talker(2)]))
    assert [(row.outcome, len(row.sites)) for row in found] == [("refused", 2), ("replaced", 1)]
    assert found[0].reason == "proof failed: margin 1.2 is below 5"


def test_what_cant_be_proven_for_different_reasons_is_in_different_rows() -> None:
    def silent(layer: int, reason: str) -> Step:
        found = replace(verdict(0.02, 0.0, passed=False), powerless=True)
        return talker(layer, outcome="refused", reason=f"can't be proven: {reason}", verdict=found)

    whys = ["expert 3 is dead (1.0 of 5)", "w2 isn't finite", "expert 11 is dead (1e-7 of 5)"]
    found = rows(report([silent(layer, why) for layer, why in enumerate(whys)]))
    assert [(row.reason, len(row.sites)) for row in found] == [
        (f"can't be proven: {whys[0]}", 2),
        (f"can't be proven: {whys[1]}", 1),
    ]


def test_different_reasons_are_different_rows() -> None:
    steps = [
        thinker(i, outcome="refused", reason=reason, verdict=None) for i, reason in enumerate([WIDTH, NORM, WIDTH])
    ]
    assert [(row.reason, row.paths) for row in rows(report(steps))] == [
        (WIDTH, ("thinker.model.layers.{0,2}.mlp",)),
        (NORM, ("thinker.model.layers.1.mlp",)),
    ]


def test_an_irregular_group_lists_all_its_paths() -> None:
    steps = [talker(0, path=path) for path in ("a.0.b.0", "a.0.b.1", "a.1.b.0")]
    lines = text_of(report(steps)).splitlines()
    assert lines[1].startswith("~ a.0.b.{0,1}  TalkerBlock → fused  ×3")
    assert lines[2] == "  a.1.b.0"


def test_a_model_without_moe_says_so() -> None:
    text = text_of(report([], memory=Memory()))
    assert "no module here looks like a sparse-MoE block\n" in text
    assert text.endswith("0 replaced, 0 kept, 0 missed, 0 refused · 12.3 s\n")


@pytest.mark.parametrize(
    ("done", "wanted"),
    [
        ("planned", "1 to replace, 0 to keep, 0 missed, 0 refused · nothing touched · 12.3 s"),
        ("verified", "1 proven, 0 kept, 0 missed, 0 refused · the model is as it was · 12.3 s"),
        ("applied", "1 replaced, 0 kept, 0 missed, 0 refused · 12.3 s"),
        ("rolled back", "1 replaced, 0 kept, 0 missed, 0 refused · rolled back: the model is as it was · 12.3 s"),
    ],
)
def test_the_last_line_says_what_was_done(done: str, wanted: str) -> None:
    assert sentence(report([talker(0)], done=done)) == wanted


def test_what_undo_costs_is_told() -> None:
    text = text_of(report(memory=Memory(moved=3 * 2**20, new=512, kept=5 * 2**30)))
    assert "weights  3.0 MiB moved by reference · 512 B new · 5.0 GiB of originals kept for undo\n" in text


def test_an_infinite_margin_and_error_are_shown() -> None:
    text = text_of(report([talker(0, verdict=verdict(0.0, math.inf)), thinker(0, verdict=verdict(math.inf, 0.0))]))
    assert re.search(r"rel 0\s+margin ∞×", text)
    assert re.search(r"rel ∞\s+margin 0\.0×", text)


def test_where_nothing_was_compared_no_number_is_shown() -> None:
    nothing = Verdict.of_nothing("the weights in router are not all finite")
    refused = thinker(0, outcome="refused", reason=f"can't be proven: {nothing.reason}", verdict=nothing)
    text = text_of(report([refused]))
    assert "not all finite" in text and "rel" not in text and "margin" not in text
    both = text_of(report([refused, thinker(1, outcome="refused", verdict=verdict(0.5, 2.0, passed=False))]))
    assert "rel 5.0e-1" in both and "margin 2.0×" in both and "∞" not in both


def test_colours_are_there_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    page = io.StringIO()
    render(report(), Console(file=page, width=120, force_terminal=True))
    assert "\x1b[32m" in page.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue()) == text_of(report())
    page = io.StringIO()
    render(report(), Console(file=page, width=120))
    assert page.getvalue() == text_of(report())
    monkeypatch.setenv("NO_COLOR", "1")
    page = io.StringIO()
    render(report(), Console(file=page, width=120, force_terminal=True))
    assert re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", page.getvalue()) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_other_encodings_get_plain_characters(encoding: str) -> None:
    page = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    odd = talker(0, path="模.0.mlp")
    render(report([odd]), Console(file=page, width=120, color_system=None))
    page.seek(0)
    text = page.read()
    assert "TalkerBlock -> fused" in text
    assert "\\u6a21.0.mlp" in text
    assert text.isascii() or encoding != "ascii"


def scanned() -> Report:
    steps = [thinker(i, outcome="kept", reason="readable", target=None, rule=None, verdict=None) for i in range(4)]
    steps.append(Step("other.0", "OddBlock", "missed", NORM))
    return report(steps, done="scanned", memory=Memory())


def test_what_scan_found() -> None:
    page = io.StringIO()
    render(scanned(), Console(file=page, width=100, color_system=None))
    assert page.getvalue() == (
        "org/some-model  torch 2.13.0 · transformers 5.19.0\n"
        "✓ thinker.model.layers.{0..3}.mlp  ThinkerBlock  ×4\n"
        "    softmax top-8 of 128 renormalised · experts 2048→768 silu\n"
        "? other.0                          OddBlock      ×1\n"
        "    a norm after the combine is not accounted for\n"
        "5 sites: 4 readable, 1 not · 12.3 s\n"
    )
    assert repr(scanned()) == "<Report of org/some-model: 5 sites: 4 readable, 1 not · 12.3 s>"
    assert str(scanned()) == page.getvalue().rstrip()


def test_the_json_of_a_report_keeps_its_shape() -> None:
    data = json.loads(dumps(report([talker(0), thinker(3, outcome="missed", spec=None, verdict=None)]).to_json()))
    assert list(data) == [
        "schema", "model", "done", "fingerprint", "versions", "sites", "memory", "model_check", "seconds", "phases",
        "exit",
    ]  # fmt: skip
    assert data["schema"] == "moe-surgery/report/1"
    assert list(data["sites"][0]) == ["path", "kind", "outcome", "reason", "rule", "target", "spec", "proof"]
    assert {
        "passed", "reason", "reading_error", "build_error", "noise", "margin", "mutants", "tokens", "near_ties",
        "routing_flips",
    } <= set(data["sites"][0]["proof"])  # fmt: skip
    assert data["sites"][0]["spec"] == TALKER.to_json()
    assert data["sites"][1]["proof"] is None
    assert data["sites"][1]["spec"] is None
    assert list(data["memory"]) == ["moved", "new", "kept"]
    assert data["exit"] == 0


def test_an_infinite_margin_is_null_in_json() -> None:
    data = json.loads(dumps(report([talker(0, verdict=verdict(0.0, math.inf))]).to_json()))
    assert data["sites"][0]["proof"]["margin"] is None


def test_the_json_of_a_scan_keeps_its_shape() -> None:
    data = scan_data(scanned())
    assert list(data) == ["schema", "model", "versions", "sites", "seconds", "exit"]
    assert [(site["readable"], site["reason"]) for site in data["sites"]] == [*[(True, "readable")] * 4, (False, NORM)]
    assert list(data["sites"][0]) == ["path", "kind", "readable", "reason", "spec"]


def test_sites_that_a_pack_does_not_fit_share_a_row() -> None:
    reason = "✗ path: wanted talker.**, measured layers.{}.mlp"
    steps = [Step(f"layers.{i}.mlp", "Block", "missed", reason.format(i)) for i in range(94)]
    (row,) = rows(report(steps))
    assert row.paths == ("layers.{0..93}.mlp",)
    assert row.reason == reason.format("{0..93}")


def test_a_report_is_one_short_line_and_in_a_notebook_its_rows() -> None:
    shown = repr(report())
    assert shown.startswith("<Report of ")
    assert "24 replaced, 0 kept, 1 missed, 1 refused" in shown
    assert len(shown) < 200
    assert "\n" not in shown
    assert len(repr(report().replaced[0])) < 300
    page = ElementTree.fromstring(report()._repr_html_().replace("&nbsp;", " "))
    assert page.tag == "pre"
    assert "talker.model.layers.{0..19}.mlp" in "".join(page.itertext())


def test_plans_and_explanations_are_one_short_line_too_and_print_all() -> None:
    planned = Plan("org/some-model", "auto", report().steps)
    assert repr(planned).startswith("<Plan for org/some-model: 24 to replace, ") and len(repr(planned)) < 200
    assert str(planned) == str(planned.report()) and "talker.model.layers.{0..19}.mlp" in str(planned)
    assert planned._repr_html_() == planned.report()._repr_html_()
    explained = Explanation("layers.0.mlp", "Block", None, None, "a norm", ())
    assert repr(explained) == "<Explanation: layers.0.mlp can't be read>"


def test_a_picture_holds_the_report() -> None:
    drawn, again = (picture(report(), notes=[("speed", "twice as fast")]) for _ in range(2))
    assert drawn == again
    words = "".join(ElementTree.fromstring(drawn).itertext()).replace("\xa0", " ")
    assert "talker.model.layers.{0..19}.mlp" in words
    assert "speed    twice as fast" in words
    assert "24 replaced, 0 kept, 1 missed, 1 refused" in words
    assert "://" not in drawn.replace("http://www.w3.org/2000/svg", "")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.txt"
    write_whole(target, "first\n")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UsageError, match="can't write .*report.txt: No space left on device"):
        write_whole(target, "second\n")
    assert target.read_text() == "first\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_written_file_has_the_usual_rights_and_links_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        write_whole(link, "text ×\n")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "text ×\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_what_is_no_regular_file_is_written_through_and_a_file_keeps_its_rights(tmp_path: Path) -> None:
    pipe, secret = tmp_path / "pipe", tmp_path / "secret"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    secret.touch(0o600)
    write_whole(secret, "text")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="can't write /dev/full: No space left on device"):
        write_whole("/dev/full", "text")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        write_whole(tmp_path / "nowhere" / "report.txt", "text")


@pytest.mark.parametrize(
    ("function", "value", "wanted"),
    [
        (words.size, 0, "0 B"),
        (words.size, 1023, "1023 B"),
        (words.size, 1536, "1.5 KiB"),
        (words.size, 5 * 2**40, "5.0 TiB"),
        (words.error, 3.14e-3, "3.1e-3"),
        (words.error, 0.0, "0"),
        (words.ratio, 6.83, "6.8×"),
        (words.ratio, 120.4, "120×"),
        (words.ratio, 93210.0, "9.3e4×"),
        (words.ratio, math.inf, "∞×"),
        (words.duration, 0.04, "0.0 s"),
        (words.duration, 99.94, "99.9 s"),
        (words.duration, 200.0, "3 min 20 s"),
    ],
)
def test_numbers_as_words(function: Any, value: float, wanted: str) -> None:
    assert function(value) == wanted


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys, moe_surgery.report.terminal, moe_surgery.report.figure, moe_surgery.timing.blocks;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Clock:
    """A clock that only the blocks under test move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def perf_counter(self) -> float:
        return self.now

    def block(self, name: str, seconds: float) -> Any:
        def forward(x: Any) -> None:
            self.calls.append((name, tuple(x.shape)))
            self.now += seconds * (10 if len(self.calls) <= 4 else 1)  # the first calls are slow: warming up

        return forward


@pytest.mark.parametrize(("seconds", "calls"), [(1e-3, 30), (0.05, 20), (3.0, 5)])
def test_blocks_are_timed_in_turns_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    torch = pytest.importorskip("torch")
    clock = Clock()
    monkeypatch.setattr(blocks, "time", clock)
    old, new = clock.block("old", seconds), clock.block("new", seconds / 2)
    speed = blocks.measure_blocks(old, new, 8, torch.float32, name="a.0", tokens=(1,))
    (sample,) = speed.samples
    assert (sample.old, sample.new, sample.ratio) == pytest.approx((seconds, seconds / 2, 2.0))
    assert sample.calls == pytest.approx(calls, abs=7)  # two seconds' worth, at most 30 and at least 5
    names = [name for name, _ in clock.calls]
    assert all(set(pair) == {"old", "new"} for pair in zip(names[::2], names[1::2], strict=True))
    assert names[:4] == ["new", "old", "old", "new"]
    assert {shape for _, shape in clock.calls} == {(1, 1, 8)}


def test_a_slower_block_is_called_slower() -> None:
    speed = blocks.Speed("a.0", (blocks.Sample(1, 30, 2.0, 1.0), blocks.Sample(64, 30, 1.0, 3.0)))
    assert speed.sentence() == (
        "MoE block 2.0× faster at 1 token, 3.0× slower at 64 tokens (median of 30 calls in turns, a.0)"
    )
    assert json.loads(dumps(speed.to_json()))["samples"][1] == {
        "tokens": 64, "sequences": 1, "calls": 30, "old": 1.0, "new": 3.0, "ratio": pytest.approx(1 / 3),
        "spread": None, "others": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("others", "spread", "words"),
    [
        (0.1, 0.2, "2.0× faster ± 0.2"),
        (0.1, 2.5, "no ratio (the machine was busy or unsteady, single turns' ratios lie ± 2.5 around)"),
        (0.63, 0.2, "no ratio (the machine was busy, other processes had 63 % of its cores)"),
    ],
)
def test_a_busy_machine_gives_no_ratio(others: float, spread: float, words: str) -> None:
    sample = blocks.Sample(1, 30, 2.0, 1.0, 1, spread, others)
    assert sample.words() == words
    whole = blocks.Speed("a.0", (sample,)).sentence()
    assert whole.startswith("MoE block: no ratio at 1 token: the machine" if "no" in words else "MoE block 2.0× faster")
    told = blocks.Speed("a.0", (sample,)).to_json()["samples"][0]["ratio"]
    assert (told is None) == words.startswith("no ratio")


def test_what_others_take_of_the_cores_is_read_from_the_system() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"cpu 9 9 9 9\ncpu0 {ticks} 0 {ticks} 7 0 0 {ticks} 0 0 0\ncpu1 {2 * ticks} 0 0 7 9 0 0 0 0 0\n"
    assert busy_seconds(stat, {0, 1}) == 5.0
    assert busy_seconds(stat, {1}) == 2.0
    assert busy_seconds(stat, {0, 2}) is None and busy_seconds("", {0}) is None
    share = Watch().others()
    assert share is None or 0 <= share <= 1


def test_steps_are_told_by_their_sequences() -> None:
    samples = (blocks.Sample(1, 1, 2.0, 1.0), blocks.Sample(1, 5, 1.0, 3.0, sequences=8))
    speed = blocks.Speed("talker", samples, "decode step")
    assert speed.sentence() == (
        "decode step 2.0× faster at 1 sequence, 3.0× slower at 8 sequences (median of 1 call in turns, talker)"
    )
    assert {key: speed.to_json()[key] for key in ("part", "what")} == {"part": "talker", "what": "decode step"}
