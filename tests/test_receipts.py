"""What processes leave behind, and what is made of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hanging import HANG
from typer.testing import CliRunner, Result

import moe_surgery
from moe_surgery.cli.app import app
from moe_surgery.engine.receipts import check, first_failure, lives, new_run, read_all, write
from moe_surgery.errors import ProofError, ReceiptError, SurgeryError, UsageError
from moe_surgery.report.from_json import report_from_json
from moe_surgery.report.receipt import Receipt
from moe_surgery.report.report import Report

ONE = Receipt(11, 0, 1, "Model", "operated", "abc", "def", None)


def ranks(count: int, **changes: Any) -> list[Receipt]:
    return [
        replace(ONE, pid=11 + rank, rank=rank, world=count, ledger=f"own{rank}", **changes) for rank in range(count)
    ]


@pytest.fixture(scope="module")
def applied(write_tiny: Callable[[str], Path]) -> Report:
    """The report of an operation on a tiny model."""
    from transformers import Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM.from_pretrained(write_tiny("float32"))
    return moe_surgery.apply(model, target="reference")


def test_receipts_come_back_as_they_went(tmp_path: Path, applied: Report) -> None:
    full = replace(ONE, report=applied.to_json(), error="why", exit_code=12)
    path = write(tmp_path, full)
    assert path == tmp_path / "Model-rank0-11.json"
    assert json.loads(path.read_text())["schema"] == "moe-surgery/receipt/1"
    assert read_all(tmp_path) == (full,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_receipts_come_by_model_rank_and_process(tmp_path: Path) -> None:
    told = [*ranks(11), replace(ONE, model="A", pid=99)]
    for receipt in told:
        write(tmp_path, receipt)
    assert list(read_all(tmp_path)) == [told[-1], *told[:-1]]


def test_names_are_safe_and_apart(tmp_path: Path) -> None:
    models = ["../up", "a/b", "a_b", "a b", "ß", "m" * 300, "m" * 301, ".."]
    for model in models:
        assert write(tmp_path, replace(ONE, model=model)).parent == tmp_path
    assert sorted(receipt.model for receipt in read_all(tmp_path)) == sorted(models)
    assert not list(tmp_path.parent.glob("up*"))


def test_a_restarted_process_replaces_what_it_left_before(tmp_path: Path) -> None:
    old = write(tmp_path, replace(ONE, pid=99, outcome="failed", error="out of memory"))
    os.utime(old, ns=(1, 1))
    new = replace(ONE, pid=12)
    write(tmp_path, new)
    assert read_all(tmp_path) == (new,)
    check(read_all(tmp_path))


def test_a_draft_model_does_not_speak_for_its_target(tmp_path: Path) -> None:
    target = replace(ONE, outcome="unpatched", error="why")
    draft = replace(ONE, load=2)
    paths = [write(tmp_path, receipt) for receipt in (target, draft)]
    assert [path.name for path in paths] == ["Model-rank0-11.json", "Model-rank0-11.2.json"]
    assert read_all(tmp_path) == (target, draft)
    with pytest.raises(ReceiptError, match="no receipt of rank 1"):
        check([*ranks(2), *ranks(2, load=2)[:1]])


def test_a_failure_that_its_process_outlived_stays(tmp_path: Path) -> None:
    failed = replace(ONE, pid=os.getpid(), outcome="failed", error="out of memory")
    os.utime(write(tmp_path, failed), ns=(1, 1))
    write(tmp_path, replace(ONE, pid=2**22 + 1))
    with pytest.raises(SurgeryError, match="out of memory"):
        check(read_all(tmp_path))


@pytest.mark.parametrize("outcome", ["unpatched", "failed"])
def test_an_engine_does_not_speak_for_another_that_still_runs(tmp_path: Path, outcome: Any) -> None:
    first = replace(ONE, pid=os.getpid(), outcome=outcome, error="why")
    os.utime(write(tmp_path, first), ns=(1, 1))
    second = replace(ONE, pid=2**22 + 1)
    write(tmp_path, second)
    assert read_all(tmp_path) == (first, second)


def test_several_engines_of_equal_ranks_agree() -> None:
    both = [*ranks(2), *ranks(2, outcome="unpatched", fingerprint=None)]
    check(both)
    with pytest.raises(ReceiptError, match="rank 0 operated and unpatched, rank 1 operated"):
        check(both[:3])


def test_a_process_that_nobody_waited_for_has_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lives(child.pid) and lives(os.getpid())
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not lives(child.pid)
    child.wait()
    assert not lives(child.pid)


def test_other_files_in_the_folder_are_no_receipts(tmp_path: Path) -> None:
    for name in ("plan.json", "notes.txt", ".Model-rank0-1.json.x.part"):
        (tmp_path / name).write_text("{")
    assert read_all(tmp_path) == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ("", "Expecting value"),
        ("[]", "not a receipt of schema moe-surgery/receipt/1"),
        ({"schema": "moe-surgery/receipt/2"}, "not a receipt of schema"),
        ({"more": 1}, "more missing or unknown"),
        ({"outcome": "fine"}, "outcome can't be 'fine'"),
        ({"rank": "0"}, "rank can't be '0'"),
        ({"rank": 1}, "rank can't be 1"),
        ({"report": []}, r"report can't be \[\]"),
    ],
)
def test_an_unreadable_receipt_is_named(tmp_path: Path, change: str | dict[str, Any], message: str) -> None:
    path = write(tmp_path, ONE)
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=rf"{re.escape(str(path))}: not a receipt.*|.*{message}") as caught:
        read_all(tmp_path)
    assert str(caught.value).startswith(str(path)) and re.search(message, str(caught.value))


def test_a_pipe_is_no_receipt(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "Model-rank0-1.json")
    code = "import sys; from moe_surgery.engine.receipts import read_all; read_all(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=HANG)
    assert "rank0-1.json: not a receipt: no file" in done.stderr


def test_a_folder_that_isnt_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a run: No such file"):
        read_all(tmp_path / "none")
    with pytest.raises(UsageError, match="can't write"):
        write(tmp_path / "none", ONE)


def test_a_folder_is_that_of_one_run_at_a_time(tmp_path: Path) -> None:
    script = f"import sys; from moe_surgery.engine.receipts import new_run; new_run({str(tmp_path)!r})"
    script += "; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(UsageError, match=f"belongs to a run that still goes on, process {other.pid}; give another"):
            new_run(tmp_path)
        other.communicate(timeout=HANG)
    assert new_run(tmp_path) == new_run(tmp_path) == tmp_path  # which is over, and this process's own
    (tmp_path / "run.pid").write_text("no number")
    new_run(tmp_path)
    assert (tmp_path / "run.pid").read_text() == str(os.getpid())


def test_a_new_run_needs_a_folder_without_receipts(tmp_path: Path) -> None:
    assert new_run(tmp_path / "a" / "b").is_dir()
    write(tmp_path, ONE)
    with pytest.raises(UsageError, match="receipts of an earlier run"):
        new_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't make"):
        new_run(tmp_path / "file" / "sub")


@pytest.mark.parametrize(
    "receipts",
    [
        [ONE],
        ranks(3),
        ranks(2, outcome="unpatched", fingerprint=None),
        [*ranks(2), replace(ONE, model="Draft", fingerprint="other", outcome="unpatched")],
    ],
)
def test_ranks_that_agree(receipts: list[Receipt]) -> None:
    check(receipts)


@pytest.mark.parametrize(
    "receipts, message",
    [
        ([], "surgery was asked for, but no process loaded a model with it"),
        (ranks(2)[1:], r"Model: no receipt of rank 0 \(of 2\)"),
        (ranks(4)[1:3], r"Model: no receipt of ranks 0, 3 \(of 4\)"),
        ([ranks(2)[0], ranks(3)[1]], "Model: processes disagree on how many ranks there are: 2, 3"),
        (
            [ranks(2)[0], replace(ranks(2)[1], fingerprint="x")],
            "Model: plans differ between ranks: rank 0 abc, rank 1 x$",
        ),
        ([ranks(2)[0], replace(ranks(2)[1], fingerprint=None)], "plans differ between ranks: rank 0 abc, rank 1 none"),
        (
            [ranks(2)[0], replace(ranks(2)[1], outcome="unpatched")],
            "outcomes differ .* rank 0 operated, rank 1",
        ),
        ([replace(ONE, model="A"), *ranks(2)[:1]], r"Model: no receipt of rank 1 \(of 2\)"),
    ],
)
def test_ranks_that_dont(receipts: list[Receipt], message: str) -> None:
    with pytest.raises(ReceiptError, match=message) as caught:
        check(receipts)
    assert caught.value.exit_code == 15


def test_a_failure_comes_first_with_its_own_exit_code() -> None:
    failed = replace(ranks(2)[1], outcome="failed", fingerprint=None, error="layer 3 is wrong", exit_code=12)
    with pytest.raises(SurgeryError, match="^Model: rank 1 of 2: layer 3 is wrong$") as caught:
        check([failed])
    assert caught.value.exit_code == 12
    assert SurgeryError.exit_code == ProofError("x").with_code(1).exit_code == 1
    assert ProofError("x").exit_code == 12
    told = first_failure([replace(ONE, outcome="failed")])
    assert told is not None and (str(told), told.exit_code) == ("Model: failed without saying why", 1)
    assert first_failure(ranks(2)) is None


def test_a_report_is_restored(applied: Report) -> None:
    restored = report_from_json(json.loads(json.dumps(applied.to_json())))
    assert restored.to_json() == applied.to_json()
    assert restored.steps[0].verdict == applied.steps[0].verdict
    plan = moe_surgery.Plan(applied.model, "reference", applied.steps).report()
    assert report_from_json(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize("broken", [{}, {"schema": "moe-surgery/report/1"}, {"schema": "moe-surgery/report/9"}])
def test_what_is_no_report_isnt_restored(broken: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a report"):
        report_from_json(broken)


def call(*arguments: str | Path, exit_code: int) -> Result:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.parametrize(
    "where, value",
    [
        (("sites", 0, "path"), 1),
        (("sites", 0, "outcome"), "gone"),
        (("sites", 0, "spec", "router", "top_k"), "2"),
        (("sites", 0, "spec", "shared", "alpha"), [1]),
        (("sites", 0, "proof", "margin"), "large"),
        (("sites", 0, "proof", "mutants", 0, "family"), []),
        (("sites", 0, "proof", "passed"), 1),
        (("sites", 0, "weights", 0, "sink"), -1),
        (("memory", "new"), True),
        (("versions",), {"torch": 2}),
        (("phases",), {"load": "long"}),
        (("sites", 0), float("nan")),
        (("seconds",), float("inf")),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [(), ("--format", "json"), ("--html", "page.html")], ids=["text", "json", "page"])
def test_a_damaged_report_is_one_error(
    where: tuple[Any, ...],
    value: object,
    form: tuple[str, ...],
    applied: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path, replace(ONE, report=applied.to_json()))
    monkeypatch.chdir(tmp_path)
    call(tmp_path, *form, exit_code=0)
    data = json.loads(path.read_text())
    *inner, last = where
    held = data["report"]
    for key in inner:
        held = held[key]
    held[last] = value
    path.write_text(json.dumps(data))
    found = call(tmp_path, *form, exit_code=2)
    assert len(found.stderr.splitlines()) == 1 and found.stderr.startswith(f"error: {path}: not a re")


def test_a_terminal_obeys_no_name(applied: Report, tmp_path: Path) -> None:
    report = applied.but(model="\x1b[31mred\x9b0m\r", steps=(replace(applied.steps[0], path="a\x1b]0;title\x07"),))
    write(tmp_path, replace(ONE, report=report.to_json(), outcome="failed", error="\x1b[2Jgone", exit_code=12))
    found = call(tmp_path, exit_code=12)
    assert not {"\x1b", "\x9b", "\x07", "\r"} & {*found.stdout, *found.stderr}
    assert "a\\x1b]0;title\\x07" in found.stdout and found.stderr == "error: Model: \\x1b[2Jgone\n"


def test_the_command_shows_equal_reports_once(tmp_path: Path, applied: Report) -> None:
    for receipt in ranks(2, fingerprint=applied.fingerprint, report=applied.to_json()):
        write(tmp_path, receipt)
    result = call(tmp_path, exit_code=0)
    lines = result.stdout.splitlines()
    assert f"    rank 0 of 2  pid 11  operated  plan {applied.fingerprint}  ledger own0" in lines
    assert f"    rank 1 of 2  pid 12  operated  plan {applied.fingerprint}  ledger own1" in lines
    assert result.stdout.count("~ model.layers.{0,1}.mlp") == 1
    assert "rank 0   measured on this rank; the other ranks did the same" in lines
    assert lines[-1] == "1 model in 2 processes: 2 operated, 0 unpatched, 0 failed"
    assert result.stderr == ""


def test_the_command_shows_reports_that_differ(tmp_path: Path, applied: Report) -> None:
    first, second = ranks(2, fingerprint="f", report=applied.to_json())
    write(tmp_path, first)
    write(tmp_path, replace(second, report=applied.but(steps=applied.steps[:1]).to_json()))
    lines = call(tmp_path, exit_code=0).stdout.splitlines()
    assert [line for line in lines if line.endswith("of this rank alone")] == [
        "rank 0   of this rank alone",
        "rank 1   of this rank alone",
    ]


def test_the_command_ends_as_the_check_does(tmp_path: Path) -> None:
    assert "not the folder of a run: no receipts are in it" in call(tmp_path, exit_code=2).stderr
    new_run(tmp_path)
    assert "no process loaded a model" in call(tmp_path, exit_code=15).stderr
    write(tmp_path, replace(ONE, outcome="failed", error="one\nreason", exit_code=12))
    result = call(tmp_path, exit_code=12)
    assert result.stderr == "error: Model: one reason\n"
    assert "0 operated, 0 unpatched, 1 failed" in result.stdout
    found = json.loads(call(tmp_path, "--format", "json", exit_code=12).stdout)
    assert (found["schema"], found["exit"], found["error"]) == ("moe-surgery/run/1", 12, "Model: one reason")
    assert found["receipts"] == [json.loads((tmp_path / "Model-rank0-11.json").read_text())]
    call(tmp_path / "none", exit_code=2)


def test_a_page_that_cant_be_written_hides_no_failure(tmp_path: Path) -> None:
    write(tmp_path, replace(ONE, outcome="failed", error="no", exit_code=12))
    found = call(tmp_path, "--html", "/dev/full", exit_code=12)
    assert "1 failed" in found.stdout
    assert "error: can't write /dev/full: No space left on device" in found.stderr.splitlines()


def test_a_receipt_is_no_place_for_its_report(tmp_path: Path) -> None:
    path = write(tmp_path, ONE)
    before = path.read_bytes()
    assert "the command reads it" in call(tmp_path, "--html", str(path), exit_code=2).stderr
    assert path.read_bytes() == before


def test_the_command_says_what_runs_unpatched(tmp_path: Path) -> None:
    write(tmp_path, replace(ONE, outcome="unpatched", fingerprint=None, error="no kernels"))
    assert call(tmp_path, exit_code=0).stderr == "warning: Model runs unpatched in process 11: no kernels\n"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="can't (make|write to) /proc/1"):
        new_run("/proc/1")


def test_the_front_end_misses_cores_without_a_receipt(tmp_path: Path) -> None:
    from moe_surgery.engine.cores import check_cores

    write(tmp_path, replace(ONE, pid=2**22 + 1))  # of an engine that ended
    with pytest.raises(ReceiptError, match="1 of 1 engine cores started without it"):
        check_cores(tmp_path, 1)
    write(tmp_path, replace(ONE, pid=os.getpid()))
    check_cores(tmp_path, 1)


def test_the_receipts_of_an_earlier_engine_do_not_count_for_a_later_one(tmp_path: Path) -> None:
    from moe_surgery.engine.cores import check_cores

    write(tmp_path, replace(ONE, pid=os.getpid()))
    with pytest.raises(ReceiptError, match="1 of 1 engine cores started without it"):
        check_cores(tmp_path, 1, before=frozenset({os.getpid()}))
