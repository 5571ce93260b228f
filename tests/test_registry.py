"""Where packs come from: a checkout, an installed package, third parties' entry points, files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_surgery.errors import PackError, UsageError
from moe_surgery.packs.clauses import At
from moe_surgery.packs.registry import built_in_packs, check_packs, installed_packs, load_packs

ROOT = Path(__file__).parent.parent
LIST = "from moe_surgery.packs.registry import load_packs; [print(p.name, p.origin) for p in load_packs()]"


def pack_text(name: str, *, last: bool = False) -> str:
    return (
        f'[pack]\nname = "{name}"\nversion = "1"\nlast = {str(last).lower()}\n[[rule]]\nname = "r"\nfind.path = "**"\n'
    )


class ThirdParty:
    """A folder of installed distributions; each is a real package with real metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, files: dict[str, str], **points: str) -> None:
        """Install ``package`` with ``files``, and entry points ``name = value`` in the order given."""
        for name, text in files.items():
            path = self.folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        info = self.folder / f"{package}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        lines = [f"{name} = {value}\n" for name, value in points.items()]
        (info / "entry_points.txt").write_text("[moe_surgery.packs]\n" + "".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ThirdParty:
    monkeypatch.syspath_prepend(str(tmp_path))
    return ThirdParty(tmp_path)


def test_built_in_packs_are_found_and_good() -> None:
    assert [pack.name for pack in built_in_packs()] == ["generic", "qwen3-omni"]
    assert [rule.full_name for pack in load_packs() for rule in pack.rules] == [
        "qwen3-omni/talker",
        "qwen3-omni/thinker",
        "generic/any",
    ]


@pytest.mark.parametrize("model", ["model", "model.language_model"])  # transformers 5.19 and 5.24
def test_the_thinker_is_found_where_each_transformers_has_it(model: str) -> None:
    (rule,) = (rule for pack in load_packs() for rule in pack.rules if rule.full_name == "qwen3-omni/thinker")
    (globs,) = (clause.globs for clause in rule.clauses if isinstance(clause, At))
    inside = model.removeprefix("model").removeprefix(".")
    for path in (f"thinker.{model}", f"wrapped.thinker.{model}", model, inside):
        place = f"{path}.layers.3.mlp".removeprefix(".")
        assert any(glob.matches(place) for glob in globs), place
    assert not any(glob.matches(f"talker.{model}.layers.3.mlp") for glob in globs)


def run(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", ["checkout", "installed"])
def test_packs_are_found_from_a_checkout_and_when_installed(layout: str, tmp_path: Path) -> None:
    copy = tmp_path / "moe_surgery"
    shutil.copytree(ROOT / "moe_surgery", copy, ignore=shutil.ignore_patterns("__pycache__"))
    rules = tmp_path / "rules" if layout == "checkout" else copy / "rules"
    shutil.copytree(ROOT / "rules", rules, ignore=shutil.ignore_patterns("__pycache__"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(LIST, elsewhere, tmp_path)
    assert done.stdout.splitlines() == [f"qwen3-omni {rules}/qwen3_omni.toml:1", f"generic {rules}/generic.toml:1"], (
        done.stderr
    )


def test_lost_built_in_packs_are_an_error(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "moe_surgery", tmp_path / "moe_surgery", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(LIST, tmp_path, tmp_path)
    assert done.returncode != 0
    assert f"the built-in packs, {tmp_path}/rules: No such file or directory" in done.stderr


def test_reading_packs_imports_neither_torch_nor_transformers() -> None:
    done = run(f"{LIST}; import sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))", ROOT, ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_third_party_packs_come_first_and_generic_last(site: ThirdParty) -> None:
    files = {"rules/z.toml": pack_text("zz"), "a/a2.toml": pack_text("a2", last=True), "a/a1.toml": pack_text("a1")}
    files |= {"__init__.py": "", "rules/__init__.py": "", "a/__init__.py": ""}
    site.install("abpacks", files, second="abpacks.rules", first="abpacks.a")
    assert [pack.name for pack in load_packs()] == ["a1", "zz", "qwen3-omni", "a2", "generic"]
    assert load_packs()[1].origin == f"{site.folder}/abpacks/rules/z.toml:1"


def test_a_folder_without_init_serves_too(site: ThirdParty) -> None:
    site.install("nspacks", {"rules/n.toml": pack_text("n")}, packs="nspacks.rules")
    assert next(pack.name for pack in installed_packs().packs) == "n"


@pytest.mark.parametrize(
    ("value", "files", "message"),
    [
        ("bad.rules", {"rules/x.toml": pack_text("x") + "nmae = 1\n"}, 'bad/rules/x.toml:8: unknown key "nmae"'),
        ("bad", {"__init__.py": "", "x.toml": "[["}, "bad/x.toml:1: not TOML"),
        ("bad", {"__init__.py": "", "x.toml": pack_text("generic")}, 'bad/x.toml:1: a pack named "generic" is'),
        ("bad.nowhere", {"__init__.py": ""}, "bad.nowhere is no package that holds .toml files"),
        ("absent", {"__init__.py": ""}, "no package absent is installed"),
        ("bad", {"__init__.py": "raise SystemExit"}, "bad: no .toml file is there"),
        ("bad.module", {"__init__.py": "", "module.py": "", "x.toml": pack_text("x")}, "bad.module is no package"),
        ("bad:rules", {"__init__.py": "", "x.toml": pack_text("x")}, "must be the name of a package"),
    ],
)
def test_a_broken_pack_is_passed_over_with_a_warning_that_names_it(
    site: ThirdParty, caplog: pytest.LogCaptureFixture, value: str, files: dict[str, str], message: str
) -> None:
    package = f"bad{abs(hash((value, message)))}"  # imports are remembered, so each case is a package of its own
    site.install(package, files, packs=value.replace("bad", package))
    assert [pack.name for pack in load_packs()] == ["qwen3-omni", "generic"]
    (said,) = (record.getMessage().replace(package, "bad") for record in caplog.records)
    assert message in said
    assert f'entry point "packs = {value}" of bad 0.1' in said
    caplog.clear()
    assert load_packs(["generic"])
    assert not caplog.records
    with pytest.raises(UsageError, match='no pack is named "x".*passed over: '):
        load_packs(["x"])


def test_nothing_of_a_third_party_is_run(site: ThirdParty) -> None:
    files = {"__init__.py": "raise SystemExit", "rules/__init__.py": "1 / 0", "rules/x.toml": pack_text("x")}
    site.install("runs", files, packs="runs.rules")
    assert [pack.name for pack in load_packs(["x"])] == ["x"]


def test_chosen_packs_are_just_those_in_their_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text(pack_text(name))
    mine = tmp_path / "b.toml"
    assert [pack.name for pack in load_packs([mine])] == ["b"]
    assert [pack.name for pack in load_packs(["generic", str(mine), "qwen3-omni"])] == ["b", "qwen3-omni", "generic"]
    assert load_packs(check_packs([tmp_path])) == tuple(check_packs([mine, tmp_path / "a.toml"])[::-1])
    assert load_packs([]) == ()


def test_choosing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'no pack is named "qwen" \(installed: qwen3-omni, generic;'):
        load_packs(["qwen"])
    with pytest.raises(PackError, match=r"x\.toml:1: can't be read: No such file"):
        load_packs([str(tmp_path / "x.toml")])


def test_check_packs_reads_files_and_folders(tmp_path: Path) -> None:
    assert [pack.name for pack in check_packs([ROOT / "rules"])] == ["qwen3-omni", "generic"]
    with pytest.raises(PackError, match=r"no \.toml file is there"):
        check_packs([tmp_path])
    (tmp_path / "a.toml").write_text(pack_text("a"))
    (tmp_path / "b.toml").write_text("\n" + pack_text("a"))
    with pytest.raises(PackError) as caught:
        check_packs([tmp_path])
    assert str(caught.value) == f'{tmp_path}/b.toml:2: a pack named "a" is already at {tmp_path}/a.toml:1'
    (tmp_path / "b.toml").write_text("rules = 1")
    with pytest.raises(PackError, match=r"b\.toml:1: unknown key"):
        check_packs([tmp_path])
