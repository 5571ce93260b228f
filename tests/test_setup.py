"""The packaging and the set-up: what is declared agrees with what is there, and failures are told clearly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import install
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moe_surgery

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """Name → version of everything the pinned lists install."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "requirements").glob("*.txt")):
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", line
                assert canonicalize_name(requirement.name) not in found, line
                found[canonicalize_name(requirement.name)] = specifier.version
    return found


def test_every_package_is_listed() -> None:
    """Packages mapped by package-dir can't be discovered, so one left out would be missing from wheels only."""
    packages = {path.parent for path in (ROOT / "moe_surgery").rglob("*.py") if "__pycache__" not in path.parts}
    names = {".".join(path.relative_to(ROOT).parts) for path in packages} | {"moe_surgery.rules"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(names)


def test_declared_dependencies_admit_the_pins() -> None:
    pinned = pins()
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["dev"], *extras["cpu"], *PROJECT["build-system"]["requires"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)], prereleases=True), text


def test_what_breaks_transformers_stays_out() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & pins().keys()


def test_no_package_host_is_named_but_the_fallback_index() -> None:
    hosts = re.compile(r"https?://[^\s\"']*/(?:simple|whl)\b[^\s\"']*")
    folders = [".ci", "benchmarks", "docs", "examples", "moe_surgery", "requirements", "rules", "setup"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [file for file in ROOT.iterdir() if file.is_file()]
    found = {
        (file.relative_to(ROOT).as_posix(), host)
        for file in files
        if file.suffix not in {".pyc", ".png"}
        for host in hosts.findall(file.read_text(encoding="utf-8", errors="ignore"))
    }
    assert found == {("setup/install.py", install.TORCH_INDEX)}


def test_unfit_machines() -> None:
    with pytest.raises(install.SetupError, match=r"3\.11 or newer is needed, this is 3\.10"):
        install.check_machine((3, 10), "linux")
    with pytest.raises(install.SetupError, match="Linux, this is darwin"):
        install.check_machine((3, 12), "darwin")
    install.check_machine((3, 11), "linux")


@pytest.mark.parametrize(
    "checks, message",
    [
        (
            {"torch": "print(2)", "vLLM": "import no_such_module"},
            r"importing vLLM ended with exit code 1:(.|\n)*no_such_mod",
        ),
        ({"torch": "import os, signal; os.kill(os.getpid(), signal.SIGILL)"}, "importing torch ended with signal 4"),
    ],
)
def test_a_failing_import_is_named(monkeypatch: pytest.MonkeyPatch, checks: dict[str, str], message: str) -> None:
    monkeypatch.setattr(install, "CHECKS", checks)
    with pytest.raises(install.SetupError, match=message):
        install.check_imports(Path(sys.executable))


def fake_python(tmp_path: Path, script: str) -> Path:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
    python.chmod(0o755)
    return python


def test_torch_comes_from_its_own_index_if_nothing_else_has_it(tmp_path: Path) -> None:
    python = fake_python(tmp_path, 'case "$*" in *--index-url*) exit 0;; *) exit 1;; esac')
    install.install_torch(python)
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "--index-url" not in first
    assert install.TORCH_INDEX in second


def test_torch_is_not_to_be_had(tmp_path: Path) -> None:
    python = fake_python(tmp_path, 'echo "no way" >&2; exit 1')
    with pytest.raises(install.SetupError, match=r"torch-cpu\.txt\) could not be installed(.|\n)*no way(.|\n)*no way"):
        install.install_torch(python)


def test_an_environment_is_kept_if_it_fits_and_made_anew_if_not(tmp_path: Path) -> None:
    calls: list[Path] = []

    def create(directory: Path, **options: object) -> None:
        assert options == {"clear": True, "with_pip": True}
        calls.append(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install.venv, "create", create)
        bin_dir = tmp_path / "env" / "bin"
        install.make_venv(tmp_path / "env")
        assert calls == [tmp_path / "env"]
        bin_dir.mkdir(parents=True)
        (bin_dir / "python").write_text("#!/bin/sh\necho {}.{}\n".format(*sys.version_info[:2]))
        (bin_dir / "python").chmod(0o755)
        install.make_venv(tmp_path / "env")
        assert len(calls) == 1
        (bin_dir / "python").write_text("#!/bin/sh\necho 3.9\n")
        install.make_venv(tmp_path / "env")
        assert len(calls) == 2


def run_make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_make_chooses_an_interpreter_that_is_new_enough(tmp_path: Path) -> None:
    """The first of the names that runs, is 3.11 or newer and has venv; a shim that fails is passed over."""
    for name, status in (("python3.11", 1), ("python3.12", 0), ("python3", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    made = run_make("setup", f"VENV={tmp_path}/env", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert re.search(r"^python3\.12 setup/install\.py", made.stdout, re.MULTILINE), made.stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench"])
def test_every_target_sets_up_first(tmp_path: Path, target: str) -> None:
    made = run_make(target, f"VENV={tmp_path}/env", f"MODEL={tmp_path}/model", "PYTHON=some-python")
    lines = made.stdout.splitlines()
    wanted = {"demo": "moe-surgery apply", "test": "pytest", "lint": "mypy", "bench": "cpu_block.py"}[target]
    steps = [
        next(n for n, line in enumerate(lines) if text in line) for text in ("some-python setup/install.py", wanted)
    ]
    assert steps == sorted(steps)


@pytest.mark.parametrize("torch", ["2.11.0+cu130", "2.13.0+cpu", "2.14.1+cu130"])
def test_an_engines_torch_stays_whatever_it_is(torch: str) -> None:
    """vLLM pins its torch exactly; another one would break it."""
    (wanted,) = [r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "torch"]
    assert wanted.specifier.contains(torch) and not wanted.extras


def test_the_version_is_the_changelogs_and_the_tags() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert moe_surgery.__version__ in heads[:2] and heads[0] in ("Unreleased", moe_surgery.__version__)
    tag = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    tags = subprocess.run(tag, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert set(tags) <= {f"v{moe_surgery.__version__}"}


@pytest.mark.slow
def test_wheel_holds_the_package_and_the_rules(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("moe_surgery", "rules"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "cli.py"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = list((ROOT / "moe_surgery").rglob("*.py"))
    assert {path.relative_to(ROOT).as_posix() for path in modules} <= names
    rules = {f"moe_surgery/rules/{path.name}" for path in (ROOT / "rules").glob("*.toml")}
    assert rules
    assert rules | {"moe_surgery/rules/__init__.py", "moe_surgery/py.typed"} <= names
    tables = list((ROOT / "moe_surgery" / "kernels" / "configs").glob("*.json"))
    assert tables
    assert {path.relative_to(ROOT).as_posix() for path in tables} <= names
    assert not any(name.startswith(("tests", "examples", "rules", "cli.py")) for name in names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import moe_surgery.packs.registry as r; print(moe_surgery.__file__, [p.name for p in r.built_in_packs()])"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", f"import moe_surgery; {code}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in answer.stdout
    assert "qwen3-omni" in answer.stdout


def test_the_checkouts_command_line() -> None:
    answer = subprocess.run([sys.executable, str(ROOT / "cli.py"), "--version"], capture_output=True, text=True)
    assert answer.stdout.strip() == f"moe-surgery {moe_surgery.__version__}"
