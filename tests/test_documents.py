"""What README and docs print can be run as printed. The walk of write-a-pack.md has a test of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build_site
import pytest
import typer.main

from moe_surgery.cli import exits
from moe_surgery.cli.app import app
from moe_surgery.packs import registry
from moe_surgery.packs.file import parse_pack

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("**/*.md"))
TOP = typer.main.get_command(app)


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines() -> Iterator[tuple[str, str]]:
    """Every line of a code block that calls this library's command, with those it goes on in."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:    |\$ )\s*((?:\.venv/bin/)?moe-surgery .*)$", text, re.MULTILINE):
            yield page.name, line


def test_the_readme_runs_as_printed(tmp_path: Path) -> None:
    blocks = fenced(ROOT / "README.md", "python")
    assert len(blocks) == 2
    for block in blocks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if "print(report)" in block:
            assert "2 replaced, 0 kept, 0 missed, 0 refused" in done.stdout


@pytest.mark.parametrize(("page", "line"), list(shell_lines()))
def test_every_command_that_is_printed_can_be_parsed(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command, context = TOP, TOP.make_context("moe-surgery", ["doctor"], resilient_parsing=True)
    if words[0].startswith("-"):
        assert any(words[0] in parameter.opts for parameter in TOP.get_params(context)), page
        return
    while hasattr(command, "get_command"):
        command = command.get_command(context, words.pop(0))
        assert command is not None, page
    assert command.make_context("moe-surgery", words).params, page


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there"></a><a id="x" href="#x"></a><a href="mailto:a@b.c"></a>')
    (tmp_path / "b.html").write_text('<h1 id="there"></h1><a href="."></a><img src="c.svg"><a href="a.html#y"></a>')
    assert build_site.broken(tmp_path) == ["b.html: .", "b.html: c.svg", "b.html: a.html#y"]


def test_every_page_is_in_the_sites_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)


TRIED = {
    "README.md": ["python", "python"],  # below
    "docs/audit.md": ["python"],  # test_audit.py
    "docs/packs.md": ["toml", "toml"],  # below
}
"""The fenced blocks that tests try, by their languages, but for write-a-pack.md's, which has a test of its own."""


def test_every_fenced_block_is_tried() -> None:
    pages = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
    found = {name: re.findall(r"^ *```(\S*).*\n(?:.*\n)*? *```$", text, re.MULTILINE) for name, text in pages.items()}
    del found["docs/write-a-pack.md"]
    assert {name: languages for name, languages in found.items() if languages} == TRIED


def test_what_is_printed_of_packs_can_be_read() -> None:
    pack, project = fenced(ROOT / "docs" / "packs.md", "toml")
    assert parse_pack(pack.encode(), "docs/packs.md").rules
    assert list(tomllib.loads(project)["project"]["entry-points"]) == [registry.GROUP]


def test_the_table_of_served_engines_is_that_of_the_recorded_runs() -> None:
    result = ROOT / "benchmarks" / "results" / "h100-served.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "served.py"), "--table", str(result)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    for row in json.loads(result.read_text(encoding="utf-8"))["rows"]:
        assert row["outcome"] == "kept" or row["proof"]["mutants"] >= 10, row


def test_the_table_against_vllms_kernels_is_that_of_the_recorded_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "table_against_vllm.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_exit_codes_that_are_printed_are_those_of_the_command_line() -> None:
    table = re.findall(r"^\| (\d+) \| ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(code) for code in table] == [code for code, _ in exits.MEANINGS]


CODE = re.compile(r"`([^`\n]+)`")
OF_VLLM = {"--data-parallel-size", "--enable-expert-parallel"}


def spans() -> Iterator[tuple[str, str]]:
    """Every piece of code within a line of a page."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in CODE.findall(text):
            yield page.name, code


def commands(group: Any = TOP, name: str = "") -> dict[str, set[str]]:
    """The flags of every command and group, by its whole name."""
    flags = {f"{name}": {flag for parameter in group.params for flag in (*parameter.opts, *parameter.secondary_opts)}}
    for each, command in getattr(group, "commands", {}).items():
        flags |= commands(command, f"{name} {each}".strip())
    return flags


def test_every_flag_and_command_that_is_mentioned_exists() -> None:
    known = commands()
    scripts = [file for name in ("benchmarks", "examples", "tests") for file in (ROOT / name).rglob("*.py")]
    of_scripts = {flag for file in scripts for flag in re.findall(r'add_argument\("(--[\w-]+)"', file.read_text())}
    everywhere = set().union(*known.values()) | of_scripts | OF_VLLM | {"--help"}
    wrong = []
    for page, code in spans():
        words = code.split()
        if words[0] == "moe-surgery":
            words = words[1:]
            name = ""
            while words and f"{name} {words[0]}".strip() in known:
                name = f"{name} {words.pop(0)}".strip()
            if words and name == "" and not words[0].startswith("-"):
                wrong.append(f"{page}: {code}")
            flags = known[name] | {"--help"} if name else everywhere
            words = words[: words.index("--")] if "--" in words else words
        elif words[0].startswith("-") or words[0] in known:
            flags = everywhere
        else:
            continue
        given = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        wrong += [f"{page}: {flag} in {code}" for flag in sorted(given - flags)]
    assert not wrong, "\n".join(wrong)


def test_every_exit_code_that_is_mentioned_exists() -> None:
    known = {str(code) for code, _ in exits.MEANINGS}
    told = [
        (page.name, code)
        for page in PAGES
        for group in re.findall(r"\bexit codes? ((?:\d+(?:, | and | or )?)+)", page.read_text(encoding="utf-8"))
        for code in re.findall(r"\d+", group)
    ]
    assert len(told) > 5
    assert [entry for entry in told if entry[1] not in known] == []


def _literals() -> str:
    """Every string of the library's code, those in several pieces put together."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "moe_surgery").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", code)


def messages() -> list[str]:
    """What the page on troubles has in its first column, without what stands for something else."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?`[^|]*) \|", page, re.MULTILINE)
    told = [code for cell in cells for code in CODE.findall(cell)]
    return [part.strip() for code in told for part in code.split("…") if len(part.strip()) > 1]


@pytest.mark.parametrize("message", messages())
def test_every_message_on_the_page_of_troubles_is_one_of_the_librarys(message: str) -> None:
    assert message in _literals()
