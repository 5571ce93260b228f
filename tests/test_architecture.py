"""The rooms of the package are as the architecture page draws them, and know of what they may."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_surgery"
NAMED = re.compile(r"`((?:[a-z_]+/)*[a-z_]+(?:/|\.py|\.toml|\.md))`")


def places(text: str) -> set[str]:
    return set(NAMED.findall(text))


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/reading.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    named = places((ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert [place for place in sorted(named) if not (PACKAGE / place).exists() and not (ROOT / place).exists()] == []


def test_every_folder_stands_in_the_picture_and_says_what_it_is() -> None:
    page, picture = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("architecture.md", "flow.svg"))
    for folder in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        assert f"`{folder.name}/`" in page
        if folder.name not in ("installed", "testing"):
            assert f"{folder.name}/" in picture
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def test_the_picture_is_what_the_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_flow.py"))["draw"]
    assert draw() == (ROOT / "docs" / "flow.svg").read_text(encoding="utf-8")


def test_torch_fx_is_known_where_blocks_are_recorded_only() -> None:
    """import-linter knows an outside package as a whole only."""
    users = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.startswith("torch.fx") for name in names):
                users.add(path.parent.relative_to(PACKAGE).as_posix())
    assert users == {"read/record"}


def test_a_name_of_the_package_leaves_random_numbers_as_they_were() -> None:
    code = """
import random
import moe_surgery
before = random.getstate()
moe_surgery.apply
assert random.getstate() == before
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, moe_surgery; print(sorted({'torch', 'torch.fx', 'transformers', 'vllm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
