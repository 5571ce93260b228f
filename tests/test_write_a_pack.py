"""The walk of docs/write-a-pack.md as written: files saved, code run, commands started, outputs compared."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "write-a-pack.md"
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<file>\S+))?\n(?P<body>.*?)^```$", re.M | re.S)


def blocks() -> Iterator[tuple[str, str | None, str]]:
    for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        yield found["language"], found["file"], found["body"]


def test_the_page_has_all_its_steps() -> None:
    assert [(language, file) for language, file, _ in blocks()] == [
        ("python", "lantern.py"),
        ("python", None),
        ("text", None),
        ("toml", "lantern.toml"),
        ("console", None),
        ("python", None),
        ("text", None),
        ("toml", "lantern.toml"),
        ("python", None),
        ("text", None),
        ("python", "test_lantern.py"),
        ("console", None),
    ]


def test_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, object] = {}
    said = ""
    for language, file, body in blocks():
        if file is not None:
            (tmp_path / file).write_text(body, encoding="utf-8")
        elif language == "python":
            said = run(body, namespace)
        elif language == "text":
            assert said == body
        else:
            command, _, expected = body.partition("\n")
            assert expected.strip() in console(command.removeprefix("$ "), tmp_path)


def test_explain_proposes_what_the_page_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for language, file, body in blocks():
        if file is not None:
            (tmp_path / file).write_text(body, encoding="utf-8")
        elif language == "python" and "explain" in body:
            text = run(f"import moe_surgery\nfrom lantern import small\n{body}", {})
            break
    *_, first, second, _, last = text.splitlines()
    assert first == '      find.combine = "lamps + sigmoid(clouds) * moon"'
    assert second == "      read.top_k = 2"
    assert last.endswith("matched by no rule; the nearest is lantern/lamps, which fails at combine, read.top_k")


def run(code: str, namespace: dict[str, object]) -> str:
    """What ``code`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as page:
        exec(compile(code, str(PAGE), "exec"), namespace)
    return page.getvalue()


def console(command: str, directory: Path) -> str:
    """What a command prints. ``python`` and ``moe-surgery`` are those of the environment at hand."""
    program, *arguments = shlex.split(command)
    name = {"python": sys.executable, "moe-surgery": str(Path(sys.executable).with_name("moe-surgery"))}[program]
    done = subprocess.run(
        [name, *arguments], cwd=directory, env=os.environ, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
