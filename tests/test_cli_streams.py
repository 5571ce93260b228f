"""What goes to stdout and to stderr, and which exit code ends a command, as another process sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
import typer.main
from hanging import HANG
from typer.testing import CliRunner

from moe_surgery import errors
from moe_surgery.cli import exits
from moe_surgery.cli.app import app
from moe_surgery.cli.examples import EXAMPLES
from moe_surgery.cli.guard import run
from moe_surgery.cli.options import Format, Output
from moe_surgery.cli.progress import Lines, progress
from moe_surgery.cli.screen import Screen
from moe_surgery.models.opening import load_model
from moe_surgery.report.outcomes import Step
from moe_surgery.report.report import Report
from moe_surgery.report.words import size
from moe_surgery.testing.families import build

ROOT = Path(__file__).parent.parent
MAIN = "from moe_surgery.cli import main; main()"
BODY = """
import os, sys, time
from rich.console import Console
from moe_surgery.cli.guard import run
from moe_surgery.cli.options import Format, Output
from moe_surgery.cli.screen import Screen

def body(screen):
    {code}
    screen.result(lambda console: console.print("the result ×"), {{"exit": 0}}, "the result")
    return 0

import typer
try:
    run(Output({options}), body)
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
CHATTER = """
    print("python chatter"); print("python chatter", file=sys.stderr)
    os.write(1, b"C chatter\\n"); os.write(2, b"C chatter\\n")
    os.system("echo child chatter; echo child chatter >&2")
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=False)


def command(code: str, options: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return python(BODY.format(code=code.strip(), options=options), **environment)


def test_help_tells_the_exit_codes_and_imports_nothing_heavy() -> None:
    code = f"import sys, atexit; atexit.register(lambda: print(sorted(sys.modules)));{MAIN}"
    result = python(code, "--help")
    assert result.returncode == 0
    for number, meaning in exits.MEANINGS:
        assert f"{number:>3}  {meaning}" in result.stdout
    modules = result.stdout.splitlines()[-1]
    assert "'moe_surgery.cli.app'" in modules
    for heavy in ("'torch'", "'transformers'", "'vllm'"):
        assert heavy not in modules


def test_every_command_has_help_with_examples_that_can_be_parsed() -> None:
    top = typer.main.get_command(app)
    for name, examples in EXAMPLES.items():
        command, context = top, top.make_context("moe-surgery", ["doctor"], resilient_parsing=True)
        for word in name.split():
            command = command.get_command(context, word)
        text = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
        assert "<bool>" not in text
        for example in examples:
            assert example.split()[-1] in text
            words = shlex.split(example.partition("|")[0])[len(name.split()) :]
            assert command.make_context(name, words).params
    listed = {name.split()[0] for name in EXAMPLES}
    assert listed == set(top.list_commands(top.make_context("moe-surgery", ["doctor"], resilient_parsing=True)))
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


def test_the_exit_codes_are_those_of_the_errors() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert codes <= {number for number, _ in exits.MEANINGS}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.PackError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.PlanError("x"), 2),
        (errors.GradientError("x"), 1),
        (errors.ExpectationError("x"), 11),
        (errors.ProofError("x"), 12),
        (errors.UnsupportedError("x"), 14),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("form", [Format.text, Format.json])
def test_every_error_is_one_line_and_its_exit_code(
    error: BaseException, code: int, form: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(screen: Screen) -> int:
        raise error

    with pytest.raises(typer.Exit) as end:
        run(Output(format=form), body)
    assert end.value.exit_code == code
    shown = capsys.readouterr()
    assert shown.err == ("error: interrupted; nothing was left half done\n" if code == 130 else "error: x\n")
    if form is Format.json:
        assert json.loads(shown.out)["exit"] == code
    else:
        assert shown.out == ""


def test_an_unexpected_error_ends_with_1_and_shows_a_traceback_only_if_verbose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body(screen: Screen) -> int:
        raise ZeroDivisionError("of\na kind")

    for verbose in (False, True):
        with pytest.raises(typer.Exit) as end:
            run(Output(verbose=verbose), body)
        assert end.value.exit_code == 1
        text = capsys.readouterr().err
        assert ("Traceback" in text) is verbose
        last = text.splitlines()[-1]
        assert last.startswith("error: unexpected ZeroDivisionError: of a kind")
        assert ("-v shows the traceback" in last) is not verbose


def test_the_report_of_an_error_is_shown_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("m", "planned", (Step("a.0", "Block", "missed", "odd"),), "f", {})

    def body(screen: Screen) -> int:
        raise errors.ExpectationError("too few").with_report(report)

    with pytest.raises(typer.Exit) as end:
        run(Output(format=Format.json), body)
    data = json.loads(capsys.readouterr().out)
    assert (end.value.exit_code, data["exit"], data["error"]) == (11, 11, "too few")
    assert data["sites"][0]["path"] == "a.0"


@pytest.mark.parametrize("form", ["text", "json"])
def test_stdout_has_the_result_alone_and_stderr_nothing(form: str) -> None:
    result = command(CHATTER, f"format=Format.{form}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("the result ×\n" if form == "text" else '{\n  "exit": 0\n}\n')


def test_verbose_lets_everything_through_to_stderr() -> None:
    result = command(CHATTER, "verbose=True")
    assert result.stdout == "the result ×\n"
    for source in ("python", "C", "child"):
        assert result.stderr.count(f"{source} chatter") == 2


def test_the_streams_are_put_back() -> None:
    code = BODY.format(code="pass", options="").replace(
        "sys.exit(end.exit_code)",
        'print("print"); os.write(1, b"write\\n"); print("print", file=sys.stderr); os.write(2, b"write\\n")',
    )
    result = python(code, PYTHONUNBUFFERED="1")
    assert (result.stdout, result.stderr) == ("the result ×\nprint\nwrite\n", "print\nwrite\n")


def test_a_stdout_that_isnt_utf8_gets_plain_characters() -> None:
    result = command("pass", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "the result \\xd7\n")
    code = """
    from moe_surgery.report.report import Report
    screen.report(Report("mödel ×", "planned", (), "f", {}))
    """
    for form in ("text", "json"):
        result = command(code, f"format=Format.{form}", PYTHONIOENCODING="ascii")
        assert result.returncode == 0
        assert result.stdout.isascii()
        assert "m\\xf6del x" in result.stdout or "m\\u00f6del \\u00d7" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_and_is_not_taken_twice(number: signal.Signals) -> None:
    code = """
    try:
        screen.say("ready")
        time.sleep(60)
    finally:
        screen.say("putting back")
        time.sleep(0.5)
        screen.say("put back")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", BODY.format(code=code.strip(), options="")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.readline() == "putting back\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert (out, err) == ("", "put back\nerror: interrupted; nothing was left half done\n")


def test_an_interrupt_before_a_command_has_begun_ends_with_130_too() -> None:
    code = """if True:
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
    class Interrupts:
        def find_spec(self, name, *rest):
            if name == "typer":
                os.kill(os.getpid(), signal.SIGINT)
    sys.meta_path.insert(0, Interrupts())
    from moe_surgery.cli import main
    main()
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "error: interrupted\n")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit):
        run(Output(), lambda screen: 0)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_reader_that_goes_away_leaves_the_exit_code_as_it_was() -> None:
    code = """
    screen.result(lambda console: [console.print("line " * 9) for _ in range(2999)], {}, "")
    return 12
    """
    with subprocess.Popen(
        [sys.executable, "-c", BODY.format(code=code.strip(), options="")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=HANG) == 12


FULL = "error: can't write the result to stdout: No space left on device\n"
CLOSED = "error: stdout is closed; --out FILE writes the result to a file\n"


@pytest.mark.parametrize(
    ("redirect", "options", "code", "err"),
    [
        (">/dev/full", "", 2, FULL),
        (">/dev/full", "format=Format.json", 2, FULL),
        (">&-", "", 2, CLOSED),
        (">&- 2>&- <&-", "", 2, ""),
        ("2>/dev/full", "verbose=True", 0, ""),
        ("2>&-", "", 0, ""),
    ],
)
def test_a_full_or_closed_stream_is_an_error_at_most(redirect: str, options: str, code: int, err: str) -> None:
    body = BODY.format(code='screen.say("a line")' if "2>" in redirect else "pass", options=options)
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, body]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, err)
    assert result.stdout == ("" if code else "the result ×\n")


@pytest.mark.parametrize(("redirect", "code"), [(">/dev/full", 2), (">&-", 0), ("| true", 0)])
def test_help_that_cant_be_written_has_no_traceback(redirect: str, code: int) -> None:
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" --help {redirect}', sys.executable, MAIN]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr == ("error: can't write to stdout: No space left on device\n" if code else "")


def test_files_may_be_streams_and_two_results_never_meet(tmp_path: Path) -> None:
    code = """
    from pathlib import Path
    screen.will_write(Path({place!r}))
    screen.file(Path({place!r}), "the file\\n")
    """
    for place in ("-", "/dev/stdout", "/dev/fd/1"):
        result = command(code.format(place=place))
        assert (result.returncode, result.stdout, result.stderr) == (0, "the file\n", "the result ×\n")
    result = command(code.format(place="/dev/stderr"), 'out=__import__("pathlib").Path("-")')
    assert (result.stdout, result.stderr) == ("the result ×\n", "the file\n")
    one = tmp_path / "one"
    (tmp_path / "two").symlink_to(one)
    result = command(code.format(place=str(tmp_path / "two")), f'out=__import__("pathlib").Path({str(one)!r})')
    assert (result.returncode, result.stderr) == (2, f"error: {tmp_path}/two: two results can't go to one place\n")
    result = command(code.format(place=str(tmp_path)))
    assert (result.returncode, result.stderr) == (2, f"error: can't write {tmp_path}: it is a directory\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer_config.json", "modeling_mine.py"],
)
def test_no_result_replaces_a_file_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    body = "from pathlib import Path; screen.will_write(Path({!r}))"
    held, link = tmp_path / name, tmp_path / "link"
    assert command(body.format(str(held))).returncode == 0  # nothing is there to be lost
    held.write_text("{}")
    link.symlink_to(held)
    for path in (held, link):
        result = command(body.format(str(path)))
        assert (result.returncode, result.stderr) == (2, f"error: can't write {path}: it is a file of a checkpoint\n")
    assert held.read_text() == "{}"


def test_what_the_library_warns_of_is_a_line() -> None:
    result = command('__import__("logging").getLogger("moe_surgery").warning("odd\\n%s", 1)')
    assert (result.stdout, result.stderr) == ("the result ×\n", "warning: odd 1\n")


@pytest.mark.parametrize(("each", "tenths"), [(0.02, []), (0.4, range(10, 101, 10)), (0.125, [20, 40, 70, 90, 100])])
def test_a_log_gets_a_line_for_every_tenth_at_most_and_none_in_a_hurry(
    each: float, tenths: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, page = [0.0], io.StringIO()
    monkeypatch.setattr("moe_surgery.cli.progress.monotonic", lambda: now[0])
    lines = Lines(page)
    for start in (9.0, 99.0):  # imports come before a phase's first step
        lines.phase("operating")
        for done in range(69):
            now[0] = start + each * done
            lines.step(done, 68, f"layers.{done}")
    found = page.getvalue().splitlines()
    assert [line.partition("%")[0] for line in found] == ["operating", *map(str, tenths)] * 2
    if tenths:
        assert re.fullmatch(rf"{tenths[0]}% \(\d+ of 68, about \d+ s left\) layers\.\d+", found[1])
        assert found[-1] == "100% (68 of 68) layers.68"


def test_what_is_left_is_told_without_what_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a load comes after the imports that the load needs."""
    now, page = [0.0], io.StringIO()
    monkeypatch.setattr("moe_surgery.cli.progress.monotonic", lambda: now[0])
    lines = Lines(page)
    lines.phase("loading")
    for done, now[0] in enumerate((30.0, 32.0, 34.0, 234.0), 1):
        lines.step(done, 4, f"layers.{done}")
    assert page.getvalue().splitlines() == [
        "loading",
        "50% (2 of 4, about 4 s left) layers.2",
        "70% (3 of 4, about 2 s left) layers.3",
        "100% (4 of 4) layers.4",
    ]


@pytest.mark.parametrize("kept", [{}, {"max_shard_size": "200KB"}], ids=["one file", "shards"])
def test_loading_tells_the_bytes_that_were_read(
    tmp_path: Path, kept: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.cli.progress._APART", 0.0)
    model, _ = build("qwen2_moe")
    model.config.architectures = ["Qwen2MoeForCausalLM"]
    model.save_pretrained(tmp_path, **kept)
    page = io.StringIO()
    lines = Lines(page)
    lines.phase("loading")
    load_model(str(tmp_path), on_read=lines.read)
    found = page.getvalue().splitlines()[1:]
    held = size(sum(parameter.nbytes for parameter in model.parameters()))
    assert found[-1] == f"100% ({held} of {held})"
    assert 5 <= len(found) <= 10
    assert all(re.match(rf"\d+0% \(.* of {held}, about .* left\) (model|lm_head)\.", line) for line in found[:-1])


@pytest.mark.parametrize("output", [Output(no_progress=True), Output(quiet=True)], ids=["no-progress", "quiet"])
def test_no_progress_if_it_isnt_wanted(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    def body(screen: Screen) -> int:
        with screen.progress() as shown:
            shown.phase("operating")
            shown.step(1, 2, "x")
        return 0

    with pytest.raises(typer.Exit):
        run(output, body)
    assert tuple(capsys.readouterr()) == ("", "")


def _read(leader: int) -> str:
    """All that was written to a pseudo-terminal, whose other end is closed."""
    parts = []
    # Linux tells the end of it by an error.
    with os.fdopen(leader, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while part := file.read(4096):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_gets_one_bar_that_goes_away() -> None:
    leader, follower = pty.openpty()
    terminal = os.fdopen(follower, "w", encoding="utf-8")
    with terminal, progress(terminal, wanted=True, no_color=True) as shown:
        shown.phase("operating")
        for done in range(4):
            shown.step(done, 3, f"layers.{done}")
            time.sleep(0.15)
    text = _read(leader)
    assert "layers.2" in text
    assert re.search(r"2/3 \d s, about \d s left layers\.2", re.sub(r"\x1b\[[\d;?]*\w", "", text))
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


@pytest.mark.slow
def test_the_real_thing_keeps_stdout_clean_and_stderr_quiet(omni_dir: Path) -> None:
    arguments = ["apply", str(omni_dir), "--format", "json", "--generate", "1,2,3", "--new-tokens", "3"]
    result = python(MAIN, *arguments, "--no-progress")
    assert result.stderr == ""
    data = json.loads(result.stdout)
    assert (result.returncode, data["exit"]) == (0, 0)
    assert [site["outcome"] for site in data["sites"]] == ["replaced"] * 4
    assert data["tokens"]["equal"] is True


@pytest.mark.slow
def test_the_real_thing_ends_with_130_on_sigterm(omni_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "apply", str(omni_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"loading {omni_dir}, ")
    while (line := process.stderr.readline()) != "operating\n":
        assert "% (" in line, "how far loading is"
    process.terminate()
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted; nothing was left half done"
