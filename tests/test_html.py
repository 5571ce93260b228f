"""Reports as pages: true to the record, safe with any name, self-contained, legible in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import measured
from test_report import NORM, THINKER, WIDTH, report, talker, text_of, thinker

from moe_surgery.packs.match import Clue
from moe_surgery.prove.verdict import Family, Mutant, Verdict
from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.html import page, run_page
from moe_surgery.report.outcomes import Step
from moe_surgery.report.pictures.anatomy import after, before
from moe_surgery.report.pictures.ladder import ladder
from moe_surgery.report.pictures.palette import DARK, LIGHT, TONES
from moe_surgery.report.pictures.strip import strip
from moe_surgery.report.pictures.svg import alone
from moe_surgery.report.pictures.weight_map import weight_map
from moe_surgery.report.receipt import Receipt
from moe_surgery.report.report import Report
from moe_surgery.timing.blocks import Sample, Speed
from moe_surgery.weights.routes import Route

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x00'
TRAIL = (Clue("children.gate", True, "E H", "128 2048"), Clue("read.top_k", False, "6", "8"))
ROUTES = (Route("gate.weight", "", "router"), Route("experts.{0..127}.down.weight", "", "w2", 128))
_VOID = {"meta", "link", "br", "img", "wbr"}


def wrong() -> Verdict:
    families = (Family("unit", 64, 1e-7, 0.31, 1e-7), Family("large", 16, 1e-7, 0.9, 1e-7))
    mutants = (Mutant("one expert zeroed", 0.11, "unit", 0.35), Mutant("not renormalised", 0.4, "large", 0.44))
    return Verdict(False, "not the spec", 1.2e-7, 0.31, 1e-7, 0.35, mutants, 512, 3, 0, families, bound=9e-7)


def mixed() -> Report:
    """One of every outcome, a proof that failed, and names that would be markup."""
    refused = thinker(2, outcome="refused", reason="proof failed: not the spec", verdict=wrong(), weights=ROUTES)
    steps = [thinker(0), refused, Step("thinker.model.layers.3.mlp", "OddBlock", "missed", NORM, trail=TRAIL)]
    steps += [thinker(4, outcome="refused", reason=WIDTH, verdict=None), talker(7, outcome="kept", reason="fused")]
    return report([*steps, Step(f"{EVIL}.0.mlp", EVIL, "missed", EVIL, rule=EVIL, target=EVIL)], model=EVIL)


class Read(HTMLParser):
    """Tags, links and ids of a page; every element must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open += [] if tag in _VOID else [tag]
        self.attributes |= {name for name, _ in attrs}
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def test_a_page_says_what_the_terminal_says() -> None:
    made = mixed().but(model="org/model")
    words = Read(re.sub(r"<details>.*?</details>|<style>.*?</style>", "", page(made), flags=re.DOTALL)).words
    flat = "".join(words.split())
    for line in text_of(made, 400).splitlines():
        for part in re.split(r"  +|^[~=?!] | · ", line):
            part = part.removeprefix("rel ").removeprefix("margin ").replace("\\x00", "\ufffd")
            assert "".join(part.split()) in flat, part


def test_the_table_of_kinds_says_why_sites_were_passed_over() -> None:
    [step] = [step for step in mixed().steps if step.outcome == "missed"][:1]
    table = page(mixed().but(steps=(replace(step, reason="word " * 99),))).partition("Each kind of block")[2]
    [why] = re.findall(r'<div class="q why">(.*?)</div>', table.partition("</table>")[0])
    assert re.fullmatch(r"(word ){10,22}…", why)
    assert 'class="q why"' not in page(mixed().but(steps=mixed().steps[:0]))


def test_names_of_a_model_never_become_markup() -> None:
    read = Read(page(mixed(), notes=[("speed", EVIL)], error=EVIL))
    assert "script" not in read.tags and "img" not in read.tags
    assert not any(name.startswith("on") for name in read.attributes)


def test_a_page_needs_nothing_but_itself_and_its_links_resolve() -> None:
    text = page(mixed())
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "") and "url(" not in text
    read = Read(text)
    assert len(set(read.ids)) == len(read.ids)
    local = [link for link in read.links if link != "data:,"]
    assert len(local) == 6 and {link.removeprefix("#") for link in local} <= set(read.ids)


def test_the_same_report_gives_the_same_page() -> None:
    assert page(mixed()) == page(mixed())


@pytest.mark.parametrize("width", [960.0, 340.0])
def test_the_ladder_has_every_distance_in_its_order(width: float) -> None:
    verdict = replace(wrong(), build_error=2e-7, passed=True)
    drawn = ElementTree.fromstring(ladder(verdict, width))
    space = "{http://www.w3.org/2000/svg}"
    told, places = {}, {}
    for group in drawn.iter(f"{space}g"):
        name, _, number = str(group[0].text).rpartition(": ")
        told[name] = number
        marks = [element for element in group if element.tag in (f"{space}path", f"{space}circle")]
        places[name] = float(re.findall(r"[\d.]+", marks[-1].get("d") or marks[-1].get("cx") or "")[0])
    assert told == {
        "noise of the dtype": "1.0e-7",
        "old block": "1.2e-7",
        "new block": "2.0e-7",
        "one expert zeroed": "1.1e-1 · 0.3×",
        "not renormalised (large tokens)": "4.0e-1 · 0.4×",
    }
    assert all(before < after for before, after in pairwise(list(places.values())))
    assert max(places.values()) <= width


def test_wrong_blocks_are_told_apart_at_phone_width() -> None:
    one = wrong().mutants[0]
    names = "routed experts dropped", "routed experts doubled"
    verdict = replace(wrong(), mutants=tuple(replace(one, name=name, family="small") for name in names))
    drawn = ladder(verdict, 340.0)
    assert all(f">{name} (small)<" in drawn for name in names)


def test_a_wrong_block_stands_out_of_the_band_in_the_colour_of_failure() -> None:
    drawn = ladder(wrong(), 960.0)
    shapes = ElementTree.fromstring(drawn)
    band, flaw, bar = (shapes.find(f".//*[@class='{kind}']") for kind in ("tint", "flaw", "bad"))
    assert band is not None and flaw is not None and bar is not None
    assert bar.get("x") == f"{float(band.get('x', '')) + float(band.get('width', '')):g}", (
        "it starts at the band's edge"
    )
    assert float(bar.get("width", "")) > 100 and drawn.count(">✗ new block<") == 1 and "✗ old" not in drawn
    right = ladder(replace(wrong(), build_error=2e-7, passed=True), 960.0)
    assert not any(told in right for told in ('class="flaw"', 'class="bad"', "✗"))


def test_a_block_that_is_judged_alone_is_neither_old_nor_new() -> None:
    drawn = ladder(replace(wrong(), build_error=None), 960.0)
    assert ">✗ the block<" in drawn and "old block" not in drawn and "new block" not in drawn


def test_an_audit_has_its_own_outcomes() -> None:
    alone_ = replace(wrong(), build_error=None, reading_error=0.3)
    steps = [talker(0, outcome="right"), talker(1, outcome="wrong", reason="gate and up swapped", verdict=alone_)]
    steps += [talker(2, outcome="not comparable", reason=NORM, verdict=None)]
    words = Read(page(report(steps, done="audited", exit_code=12))).words
    assert "1 right, 1 wrong, 1 not comparable" in words and "gate and up swapped" in words
    assert not {"missed", "refused"} & set(words.split("\n"))
    assert "after: fused" not in words and "before:" not in words and "swapped block" not in words
    assert "as the checkpoint has it: " in words


def test_zero_and_infinity_have_places_on_the_ladder() -> None:
    drawn = ladder(replace(wrong(), build_error=float("inf"), reading_error=0.0), 960.0)
    assert ">∞<" in drawn and ">0<" in drawn and "nan" not in drawn


def test_every_site_has_its_cell() -> None:
    made = mixed()
    for width in (960.0, 340.0):
        cells = re.findall(r"<title>(.*?): (\w+)</title>", strip(made, width))
        assert [outcome for _, outcome in cells].count("refused") == 2 and len(cells) == len(made.steps)


def test_a_layer_whose_experts_alone_are_the_site_stands_in_the_blocks_row() -> None:
    alone_ = replace(thinker(0), path="thinker.model.layers.0.mlp.experts")
    drawn = strip(report([alone_, thinker(1)]), 960.0)
    assert ">thinker.model.layers.N.mlp or .experts<" in drawn and 'class="line"' not in drawn
    both = strip(report([replace(alone_, path="thinker.model.layers.1.mlp.experts"), thinker(1)]), 960.0)
    assert ">thinker.model.layers.N.mlp<" in both and ">thinker.model.layers.N.mlp.experts<" in both


def test_a_plan_has_no_columns_for_what_only_a_proof_measures_and_a_path_is_no_heading() -> None:
    planned = report([replace(thinker(0), verdict=None)], done="planned", model="/models/small")
    text = page(planned)
    assert ">margin</th>" not in text and "<h1>small</h1>" in text and "<code>/models/small</code>" in text
    assert ">margin</th>" in page(report([thinker(0)])) and "<h1>org/model</h1>" in page(report(model="org/model"))


def test_only_the_experts_are_framed_where_only_they_are_replaced() -> None:
    whole, alone_ = after(THINKER, ROUTES, "vllm"), after(replace(THINKER, at="experts"), ROUTES, "vllm")
    assert "as it was" in alone_ and "as it was" not in whole
    assert 'class="frame"' in whole and 'class="frame"' in alone_ and 'class="frame"' not in before(THINKER, (), "B")


def test_pictures_are_files_of_their_own_too() -> None:
    for drawn in (strip(mixed(), 700.0), ladder(wrong(), 700.0), weight_map(THINKER, ROUTES, 700.0)):
        assert ElementTree.fromstring(alone(drawn)).tag.endswith("svg")


def test_speeds_stand_with_their_spread() -> None:
    speed = Speed("layers.0.mlp", (Sample(64, 30, 2e-3, 1e-3, spread=0.1),))
    words = Read(page(report(), speeds=[speed], notes=[("speed", speed.sentence())])).words
    assert "2.0× faster ± 0.1" in words and "2 ms" in words and "1 ms" in words
    assert speed.sentence() not in words


def test_a_page_survives_the_record() -> None:
    made = mixed().but(model="org/model")
    again = report_from_json(made.to_json())
    assert page(again) == page(made)


def test_the_page_of_a_run_has_every_process_and_rank() -> None:
    ranks = [Receipt(10 + n, n, 2, "Model", "operated", "7f3a", f"led{n}", report().to_json()) for n in range(2)]
    other = report([talker(0, outcome="refused", reason=WIDTH)]).to_json()
    for told, count in ((ranks, 1), ([ranks[0], replace(ranks[1], report=other)], 2)):
        read = Read(run_page("a/run", [*told, Receipt(9, 0, 1, EVIL, "failed", None, None, None, EVIL, 1)], EVIL, 15))
        assert read.words.count("The model, layer by layer") == count
        assert len(set(read.ids)) == len(read.ids) and "script" not in read.tags
        assert {"10", "11", "9", "led0", "led1"} <= set(read.words.split("\n"))


def _light(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_can_be_read_in_both_schemes(scheme: dict[str, str]) -> None:
    pairs = [(tone, "paper") for tone in {*TONES.values(), "ink", "muted"}]
    pairs += [("ink", "panel"), ("muted", "panel"), ("bad", "panel"), ("bad", "flaw")]
    for text, ground in pairs:
        low, high = sorted((_light(scheme[text]), _light(scheme[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_it_without_complaint(width: int, dark: bool, tmp_path: Path) -> None:
    found = measured(page(mixed()), tmp_path, width, dark=dark)
    assert found["wide"] <= found["shown"], "something sticks out to the right"
    assert found["contrast"] >= 4.5, found["where"]
    assert found["background"] == ("rgb(16, 19, 24)" if dark else "rgb(255, 255, 255)")
