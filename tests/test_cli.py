"""The commands on small real models, in process; the reference target, which builds quickly, unless said otherwise."""

from __future__ import annotations

import html
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
from typer.testing import CliRunner, Result

import moe_surgery
import moe_surgery.models.greedy
import moe_surgery.testing
from moe_surgery import verbs
from moe_surgery.cli.app import app
from moe_surgery.cli.apply_verify import Tokens
from moe_surgery.errors import UnsupportedError
from moe_surgery.packs.file import parse_pack
from moe_surgery.packs.registry import load_packs
from moe_surgery.targets.reference_target import ReferenceTarget

REFERENCE = ("--target", "reference")
DATA: dict[str, Any] = {"target": "reference"}
SPEC = "softmax top-3 of 8 renormalised · experts 32→16 silu · shared 32 silu, sigmoid gate"
SITES = "model.layers.{0..2}.mlp"


@pytest.fixture(scope="module")
def model() -> Iterator[str]:
    """A directory with a small Qwen2-MoE checkpoint: three MoE blocks. Its path is short enough for one line."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    made = Qwen2MoeForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if "mlp" in name:  # the default scale makes experts negligible
            nn.init.normal_(parameter, std=0.3)
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "tiny"
        made.save_pretrained(directory)
        yield str(directory)


@pytest.fixture(scope="module")
def live(model: str) -> nn.Module:
    return Qwen2MoeForCausalLM.from_pretrained(model).eval()


def call(*arguments: str | Path, exit_code: int = 0) -> Result:
    """Run a command without progress; its exit code is what is wanted."""
    flags = () if arguments[0] == "packs" else ("--no-progress",)
    result = CliRunner().invoke(app, [*map(str, arguments), *flags])
    assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
    return result


def data(*arguments: str | Path, exit_code: int = 0) -> dict[str, Any]:
    """The JSON that a command prints; it says the same exit code."""
    found: dict[str, Any] = json.loads(call(*arguments, "--format", "json", exit_code=exit_code).stdout)
    assert found["exit"] == exit_code
    return found


class Flipped(ReferenceTarget):
    """A wrong target: its experts' weights are in the wrong order."""

    def build(self, spec: Any, tensors: Any, *, prefix: str) -> Any:
        return super().build(spec, replace(tensors, w2=tensors.w2.flip(0)), prefix=prefix)


def test_scan_shows_every_site(model: str) -> None:
    result = call("scan", model)
    lines = result.stdout.splitlines()
    assert lines[1] == f"✓ {SITES}  Qwen2MoeSparseMoeBlock  ×3"
    assert lines[2] == f"    {SPEC}"
    assert lines[3].startswith("3 sites: 3 readable, 0 not · ")
    assert result.stderr == ""


def test_scan_as_json(model: str) -> None:
    found = data("scan", model)
    assert found["schema"] == "moe-surgery/scan/1"
    assert [site["path"] for site in found["sites"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(site["readable"] for site in found["sites"])


def test_plan_touches_nothing_and_says_what_would_be_done(model: str) -> None:
    lines = call("plan", model, *REFERENCE).stdout.splitlines()
    assert lines[1].startswith(f"~ {SITES}  Qwen2MoeSparseMoeBlock → reference")
    assert lines[-1].startswith("3 to replace, 0 to keep, 0 missed, 0 refused · nothing touched · ")


def test_plan_check_ends_with_10_only_if_something_would_change(model: str) -> None:
    assert data("plan", model, *REFERENCE, "--check", exit_code=10)["done"] == "planned"
    call("plan", model, *REFERENCE, "--check", "--skip", "**", exit_code=0)


def test_only_and_skip_choose_sites(model: str) -> None:
    found = data("plan", model, *REFERENCE, "--only", "**.0.mlp", "--only", "**.1.mlp", "--skip", "**.1.*")
    assert [site["outcome"] for site in found["sites"]] == ["replaced", "kept", "kept"]


def test_an_expectation_that_fails_ends_with_11_and_shows_what_was_found(model: str) -> None:
    result = call("plan", model, *REFERENCE, "--expect", "4", exit_code=11)
    assert f"~ {SITES}" in result.stdout
    assert result.stderr == "error: expected 4 sites to replace, found 3\n"
    found = data("plan", model, *REFERENCE, "--expect", "4", exit_code=11)
    assert found["error"] == "expected 4 sites to replace, found 3"
    assert len(found["sites"]) == 3


def test_of_two_packs_that_want_the_same_sites_the_error_names_who_had_them(model: str, tmp_path: Path) -> None:
    rule = '[pack]\nname = "{0}"\nversion = "1"\n[[rule]]\nname = "r"\nfind.path = "**"\nexpect.count = 3\n'
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(rule.format(name))
    error = call("plan", model, *REFERENCE, "--pack", tmp_path / "a.toml", "--pack", tmp_path / "b.toml", exit_code=11)
    assert "b/r expects 3 sites and matches 0 (" in error.stderr
    assert error.stderr.endswith(f"; of the sites that fit it, a/r ({tmp_path / 'a.toml'}:4) first matched 3\n")


def test_strict_ends_with_11_if_a_site_is_missed(model: str, tmp_path: Path) -> None:
    pack = tmp_path / "none.toml"
    pack.write_text('[pack]\nname = "none"\nversion = "1"\n[[rule]]\nname = "none"\nfind.path = "nowhere"\n')
    assert data("plan", model, *REFERENCE, "--pack", pack)["sites"][0]["outcome"] == "missed"
    assert "strict" in call("plan", model, *REFERENCE, "--pack", pack, "--strict", exit_code=11).stderr


def test_a_plan_is_saved_reviewed_and_applied(model: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned = data("plan", model, *REFERENCE, "-o", file)
    applied = data("apply", file)
    assert applied["done"] == "applied"
    assert applied["fingerprint"] == planned["fingerprint"]
    assert applied["model"] == model
    assert "would change it" in call("apply", file, "--only", "**", exit_code=2).stderr
    assert data("verify", file)["done"] == "verified"


def test_a_plan_that_was_edited_is_refused(model: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    call("plan", model, *REFERENCE, "-o", file)
    file.write_text(file.read_text().replace('"top_k": 3', '"top_k": 2'))
    assert "changed" in call("apply", file, exit_code=2).stderr


def test_a_plan_that_cant_be_saved_is_one_clear_error(model: str, tmp_path: Path) -> None:
    result = call("plan", model, *REFERENCE, "-o", tmp_path / "no" / "plan.json", exit_code=2)
    assert result.stderr.startswith("error: can't write ")
    assert len(result.stderr.splitlines()) == 1


def test_apply_reports_proof_memory_speed_and_equal_tokens(model: str) -> None:
    lines = call("apply", model, *REFERENCE, "--generate", "1,2,3", "--new-tokens", "5").stdout.splitlines()
    assert lines[1].startswith(f"~ {SITES}  Qwen2MoeSparseMoeBlock → ")
    assert " ×3  rel " in lines[1]
    assert "margin" in lines[1]
    assert lines[3].startswith("weights  ")
    assert lines[4].startswith("model    the whole model, run on 8 tokens, ")
    assert lines[5].startswith("speed    MoE block")
    assert " at 1 token, " in lines[5]
    assert any(line.startswith("tokens   model: the same 5 greedy tokens, ") for line in lines)
    assert lines[-1].startswith("3 replaced, 0 kept, 0 missed, 0 refused · ")


def test_experts_that_are_not_timed_are_told_so(tmp_path: Path) -> None:
    with_own_router, _ = moe_surgery.testing.build("nllb_moe")
    with_own_router.save_pretrained(tmp_path)
    told = call("apply", str(tmp_path), "--target", "reference", "--no-model-check").stdout
    assert "speed    experts behind a router of the model's own are not timed by themselves" in told


def test_apply_as_json_has_speed_and_tokens(model: str) -> None:
    found = data("apply", model, *REFERENCE, "--generate", "1,2,3", "--new-tokens", "5")
    assert [sample["tokens"] for sample in found["speed"][0]["samples"]] == [1, 64]
    assert found["tokens"]["equal"] is True
    assert found["tokens"]["before"] == found["tokens"]["after"]
    assert len(found["tokens"]["before"]["model"]) == 5
    assert all(site["proof"]["passed"] for site in found["sites"])


def test_bench_times_blocks_and_steps_and_puts_the_originals_back(model: str) -> None:
    found = data("bench", model, *REFERENCE, "--tokens", "1", "--tokens", "3", "--batch", "2")
    [speed] = found["speed"]
    assert [sample["tokens"] for sample in speed["samples"]] == [1, 3]
    steps = [
        (step["part"], step["what"], sample["tokens"], sample["sequences"])
        for step in found["steps"]
        for sample in step["samples"]
    ]
    assert steps == [("model", "decode step", 1, 2), ("model", "prefill", 3, 1)]
    assert found["no_step"] == []
    samples = [sample for each in (speed, *found["steps"]) for sample in each["samples"]]
    assert all(sample["ratio"] in (None, pytest.approx(sample["old"] / sample["new"])) for sample in samples)


def test_bench_prints_a_line_for_each(model: str) -> None:
    lines = call("bench", model, *REFERENCE, "--tokens", "3", "--batch", "2").stdout.splitlines()
    spoken = [line for line in lines if line.startswith("speed    ")]
    assert [line.split()[1].rstrip(":") for line in spoken] == ["decode", "prefill", "MoE"]
    assert " at 2 sequences" in spoken[0] and " at 3 tokens" in spoken[1]


def test_bench_of_nothing_says_so(model: str) -> None:
    lines = call("bench", model, *REFERENCE, "--skip", "**").stdout.splitlines()
    assert "speed    no step: nothing was replaced" in lines


def test_eager_is_for_engines(model: str) -> None:
    assert "--eager is for --engine" in call("bench", model, "--eager", exit_code=2).stderr


def test_apply_without_undo_keeps_and_times_nothing(model: str) -> None:
    found = data("apply", model, *REFERENCE, "--no-undo")
    assert found["memory"]["kept"] == 0
    assert found["speed"] == []


def test_a_failed_proof_ends_with_12_and_says_where(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Flipped())
    result = call("apply", model, exit_code=12)
    assert "rolled back: the model is as it was" in result.stdout
    assert result.stderr.startswith("error: model.layers.0.mlp: ")
    found = data("apply", model, exit_code=12)
    assert found["done"] == "rolled back"
    assert found["sites"][0]["outcome"] == "refused"
    assert found["sites"][0]["proof"]["passed"] is False


def test_verify_ends_with_12_if_a_proof_fails(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data("verify", model, *REFERENCE)["done"] == "verified"
    monkeypatch.setattr(verbs, "get_target", lambda name: Flipped())
    result = call("verify", model, exit_code=12)
    assert result.stderr == "error: the proof failed at 3 sites, first model.layers.0.mlp\n"
    assert data("verify", model, exit_code=12)["done"] == "verified"


class Greedy(ReferenceTarget):
    """A target that asks for more memory than any machine has."""

    def build(self, spec: Any, tensors: Any, *, prefix: str) -> Any:
        return torch.empty(10**16)


def test_memory_that_isnt_there_is_called_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Greedy())
    result = call("apply", model, exit_code=1)
    assert result.stderr.startswith("error: out of memory: ") and "allocate" in result.stderr


def test_tokens_that_differ_end_with_12(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.cycle([{"model": [1, 2, 3]}, {"model": [1, 2, 9]}])
    monkeypatch.setattr(moe_surgery.models.greedy, "greedy_tokens", lambda *_: next(answers))
    result = call("apply", model, *REFERENCE, "--generate", "1,2,3", exit_code=12)
    assert "model: GREEDY TOKENS DIFFER from number 3 on: 3 became 9" in result.stdout
    assert result.stderr == "error: greedy tokens before and after differ\n"
    found = data("apply", model, *REFERENCE, "--generate", "1,2,3", exit_code=12)
    assert found["tokens"]["equal"] is False
    result = call("apply", model, *REFERENCE, "--generate", "1,2,3", "--dtype", "bfloat16", exit_code=0)
    assert result.stderr.startswith("warning: greedy tokens before and after differ")
    assert "--dtype float32 tells" in result.stderr


def test_tokens_say_where_they_part() -> None:
    tokens = Tokens({"a": [1, 2], "b": [1, 2], "c": list(range(20))}, {"a": [1, 2], "b": [1], "c": list(range(20))})
    assert not tokens.equal
    assert tokens.sentences() == [
        "a: the same 2 greedy tokens, 1 2",
        "b: GREEDY TOKENS DIFFER: 2 before, 1 after",
        "c: the same 20 greedy tokens, 0 1 2 3 4 5 6 7 …",
    ]


@pytest.mark.parametrize("prompt", ["", "a", "1,,2", "1,-2", "1.5"])
def test_a_prompt_must_be_token_ids(model: str, prompt: str) -> None:
    assert "--generate takes token ids" in call("apply", model, "--generate", prompt, exit_code=2).stderr


def test_a_prompt_outside_the_vocabulary_is_one_clear_error(model: str) -> None:
    assert "token 99 " in call("apply", model, *REFERENCE, "--generate", "1,99", exit_code=2).stderr


def test_the_dtype_asked_for_is_used(model: str) -> None:
    found = data("verify", model, *REFERENCE, "--dtype", "bfloat16", "--margin", "2")
    # bfloat16 rounds at 2^-9, float32 at 2^-24: their errors can't be taken for each other.
    assert all(site["proof"]["noise"] > 1e-4 for site in found["sites"])


def test_explain_shows_every_rule_and_clause(model: str) -> None:
    text = call("explain", model, "model.layers.1.mlp").stdout
    lines = text.splitlines()
    assert lines[:2] == ["model.layers.1.mlp  Qwen2MoeSparseMoeBlock", f"computes  {SPEC}"]
    assert "combines  experts + sigmoid(shared_expert_gate) * shared_expert" in lines
    assert any(line.startswith("✓ generic/any: every clause holds") for line in lines)
    assert any(line.startswith("✗ qwen3-omni/thinker: ") for line in lines)
    at = next(number for number, line in enumerate(lines) if "✗ model_type" in line)
    assert lines[at].split()[-2:] == ["wanted", "qwen3_omni_moe_talker_text"]
    assert lines[at + 1].split()[-2:] == ["measured", "qwen2_moe"]
    assert '      model_type = "qwen2_moe"' in lines
    assert lines[-1] == "model.layers.1.mlp is matched by generic/any"


def test_explain_puts_the_nearest_rule_first(model: str) -> None:
    found = data("explain", model, "model.layers.1.mlp")
    failed = [sum(not clause["held"] for clause in rule["clauses"]) for rule in found["rules"]]
    assert failed == sorted(failed)
    assert set(found["rules"][0]["clauses"][0]) == {"clause", "held", "wanted", "measured"}


def test_explain_says_what_a_site_that_can_not_be_read_lacks() -> None:
    """Of such a site the clauses that need no reading are still held against it."""
    from moe_surgery.testing import build

    unreadable, _ = build("vitpose_backbone")
    bank = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    unreadable.encoder.layer[0].mlp.experts = bank
    found = moe_surgery.explain(unreadable, "encoder.layer.0.mlp")
    assert found.unread and found.spec is None and found.edits == {}
    clauses = {rule.full_name: [clue.clause for clue in miss.trail] for rule, miss in found.trails}
    assert clauses["generic/any"] == ["path"]
    assert clauses["qwen3-omni/thinker"] == ["path", "config", "model_type", "requires.transformers"]
    assert "? generic/any: would be tried" in str(found)


def test_explain_one_rule(model: str) -> None:
    for name in ("thinker", "qwen3-omni/thinker"):
        found = data("explain", model, "model.layers.1.mlp", "--rule", name)
        assert [rule["rule"] for rule in found["rules"]] == ["qwen3-omni/thinker"]
    assert "no rule is named" in call("explain", model, "model.layers.1.mlp", "--rule", "x", exit_code=2).stderr


def test_explain_a_path_that_is_no_site_names_the_sites(model: str) -> None:
    assert "model.layers.0.mlp" in call("explain", model, "model.layers.9.mlp", exit_code=2).stderr


@pytest.mark.parametrize("command", ["scan", "plan", "apply", "verify"])
def test_a_model_that_isnt_there_is_a_usage_error(command: str, tmp_path: Path) -> None:
    result = call(command, tmp_path / "nothing", exit_code=2)
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}/nothing")
    assert len(result.stderr.splitlines()) == 1


def test_an_error_as_json(tmp_path: Path) -> None:
    found = data("scan", tmp_path / "nothing", exit_code=2)
    assert list(found) == ["schema", "error", "exit"]
    assert found["schema"] == "moe-surgery/error/1"


def test_a_bad_pack_names_file_and_line(model: str, tmp_path: Path) -> None:
    pack = tmp_path / "bad.toml"
    pack.write_text('[pack]\nname = "bad"\nversion = "1"\nnonsense = 1\n')
    for arguments in (("plan", model, "--pack", pack), ("packs", "check", pack)):
        assert call(*arguments, exit_code=2).stderr.startswith(f"error: {pack}:4: ")


@pytest.mark.parametrize(
    "arguments",
    [("scan",), ("scan", "m", "--nonsense"), ("apply", "m", "--margin", "0.5"), ("plan", "m", "--expect", "-1")],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments, exit_code=2)
    assert result.stdout == ""
    assert result.stderr


def test_an_unknown_target_is_a_usage_error(model: str) -> None:
    assert "no target is named 'nonsense'" in call("plan", model, "--target", "nonsense", exit_code=2).stderr


def test_the_result_can_go_to_a_file(model: str, tmp_path: Path) -> None:
    for name, flags in (("report.txt", ()), ("report.json", ("--format", "json"))):
        result = call("plan", model, *REFERENCE, "--out", tmp_path / name, *flags)
        assert result.stdout == ""
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()[1].startswith(f"~ {SITES}")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["exit"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt"]
    assert "can't write" in call("plan", model, *REFERENCE, "--out", tmp_path / "no" / "x", exit_code=2).stderr


@pytest.mark.parametrize("flag", ["--html", "--svg", "--out"])
def test_a_file_on_a_full_disk_loses_no_result(model: str, flag: str) -> None:
    found = call("verify", model, *REFERENCE, flag, "/dev/full", exit_code=2)
    shown = found.stderr if flag == "--out" else found.stdout
    assert "3 proven, 0 kept, 0 missed, 0 refused" in shown
    assert found.stderr.splitlines()[-1] == "error: can't write /dev/full: No space left on device"


def test_a_full_disk_hides_no_failure(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Flipped())
    found = call("verify", model, *REFERENCE, "--html", "/dev/full", exit_code=12)
    assert [line.partition(" at ")[0] for line in found.stderr.splitlines()] == [
        "error: can't write /dev/full: No space left on device",
        "error: the proof failed",
    ]


def test_no_result_replaces_what_the_command_reads(model: str, tmp_path: Path) -> None:
    pack, made, other = (tmp_path / name for name in ("mine.toml", "plan.json", "other.json"))
    shutil.copy(Path(__file__).parent.parent / "rules" / "generic.toml", pack)
    pack.write_text(pack.read_text().replace('"generic"', '"mine"'))
    for each in (made, other):
        call("plan", model, *REFERENCE, "-o", each)
    link = tmp_path / "link"
    link.symlink_to(made)
    before = {path: path.read_bytes() for path in (pack, made, other)}
    for given in (
        ["apply", made, "--out", made],
        ["verify", made, "--html", link],
        ["bench", link, "--svg", made],
        ["diff", made, other, "--out", other],
        ["explain", model, "model.layers.0.mlp", "--pack", pack, "--out", pack],
        ["plan", model, "--pack", pack, *REFERENCE, "-o", pack],
        ["packs", "show", pack, "--out", pack],
        ["packs", "check", pack, "--out", pack],
    ):
        found = call(*given, exit_code=2)
        assert found.stderr == f"error: can't write {given[-1]}: the command reads it\n", given
    assert {path: path.read_bytes() for path in before} == before


def test_quiet_leaves_the_last_line(model: str) -> None:
    result = CliRunner().invoke(app, ["plan", model, *REFERENCE, "-q"])
    assert result.stdout.startswith("3 to replace, ")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_quiet_leaves_a_file_whole(model: str, tmp_path: Path) -> None:
    assert call("plan", model, *REFERENCE, "-q", "--out", tmp_path / "report.txt").stdout == ""
    lines = (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"{model}  moe-surgery ") and lines[1].startswith(f"~ {SITES}")
    assert lines[-1].startswith("3 to replace, ")


def test_a_picture_is_written(model: str, tmp_path: Path) -> None:
    call("apply", model, *REFERENCE, "--svg", tmp_path / "report.svg")
    picture = (tmp_path / "report.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "{0..2}.mlp" in picture


def test_a_page_is_written_of_what_the_result_says(model: str, tmp_path: Path) -> None:
    for command in ("plan", "verify", "apply", "bench"):
        few = ("--tokens", "1", "--batch", "1") if command == "bench" else ()
        told = call(command, model, *REFERENCE, *few, "--html", tmp_path / "page.html").stdout.splitlines()
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert (
            told[-1] in page and "{0..2}.mlp" in page and ("<h2>Speed</h2>" in page) == (command in ("apply", "bench"))
        )
    assert {"load", "read", "prove", "exchange"} <= data("apply", model, *REFERENCE)["phases"].keys()


def test_the_page_of_a_failure_shows_the_wrong_block(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Flipped())
    error = call("apply", model, *REFERENCE, "--html", tmp_path / "page.html", exit_code=12).stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert " ".join(error.split())[len("error: ") :] in html.unescape(page) and 'class="bad"' in page
    (tmp_path / "page.html").unlink()
    call("apply", tmp_path / "none", "--html", tmp_path / "page.html", exit_code=2)
    assert not (tmp_path / "page.html").exists()


def test_colour_only_where_it_is_asked_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in call("plan", model, *REFERENCE).stdout
    assert "\x1b[" not in call("plan", model, *REFERENCE, "--color", "never").stdout
    assert "\x1b[32m" in call("plan", model, *REFERENCE, "--color", "always").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" in call("plan", model, *REFERENCE, "--color", "always").stdout


def test_packs_are_listed_shown_and_checked(tmp_path: Path) -> None:
    text = call("packs", "list").stdout
    assert "qwen3-omni/talker" in text
    assert text.splitlines()[-1].startswith("2 packs, ")
    found = data("packs", "list")
    assert found["schema"] == "moe-surgery/packs/1"
    assert all(":" in rule["origin"] for pack in found["packs"] for rule in pack["rules"])
    shown = call("packs", "show", "qwen3-omni").stdout
    assert parse_pack(shown.encode(), "shown.toml") == load_packs(["qwen3-omni"])[0]
    file = tmp_path / "copy.toml"
    file.write_text(shown)
    assert data("packs", "check", file)["packs"][0]["name"] == "qwen3-omni"
    assert data("packs", "show", file)["pack"]["name"] == "qwen3-omni"
    assert "no pack is named" in call("packs", "show", "nonsense", exit_code=2).stderr


def _broken(message: str) -> Callable[[], None]:
    def fail() -> None:
        raise UnsupportedError(message)

    return fail


def test_doctor_finds_this_installation_sound() -> None:
    found = data("doctor")
    assert [check["name"] for check in found["checks"]] == [
        "python", "torch", "transformers", "engine", "kernels", "packs", "plugin", "launcher",
    ]  # fmt: skip
    assert all(check["ok"] or not check["blocking"] for check in found["checks"])
    assert "0.32" in found["checks"][3]["found"]
    assert call("doctor").stdout.splitlines()[-1] == "ready to operate"


def test_doctor_ends_with_14_and_a_hint_if_the_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.targets.vllm import eras, target

    monkeypatch.setattr(eras, "detect", _broken("vLLM is not installed"))
    monkeypatch.setattr(target, "detect", _broken("vLLM is not installed"))
    lines = call("doctor", exit_code=14).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("✗ engine"))
    assert "vLLM is not installed" in lines[at]
    assert "pip install" in lines[at + 1]
    assert lines[-1] == "not ready: 2 problems"


def test_doctor_names_a_package_whose_build_is_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = call("doctor", exit_code=14).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("✗ torch "))
    told = " ".join(" ".join(lines[at : at + 3]).split())
    assert (
        "; torchvision can't be imported: operator torchvision::nms does not exist pip uninstall torchvision:" in told
    )


def test_plan_ends_with_14_if_the_engine_is_missing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.targets.vllm import target

    monkeypatch.setattr(target, "look_up", _broken("vLLM is not installed"))
    assert call("plan", model, exit_code=14).stderr == "error: vLLM is not installed\n"
    monkeypatch.setattr(target, "detect", _broken("vLLM is not installed"))
    for wanted in (["scan", model], ["explain", model, "model.layers.0.mlp"], ["plan", model, "--device", "cuda"]):
        call(*wanted)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["apply", "", *REFERENCE], 2, "no model is named"),
        (["apply", "/dev/null"], 2, "/dev/null: a file"),
        (["apply", "x" * 300], 2, "File name too long"),
        (["plan", "{}", "-o", "/nowhere/plan.json"], 2, "can't write /nowhere/plan.json: no such directory"),
        (["plan", "{}", "--svg", "{}"], 2, "it is a directory"),
        (["plan", "{}", "--target", "nosuch"], 2, "no target is named 'nosuch'"),
        (["plan", "{}", "--only", "re:(?=x)"], 2, "no lookaround"),
        (["apply", "{}", *REFERENCE, "--generate", "64"], 2, "token 64 is not in the vocabulary of 64"),
        (["apply", "{}", *REFERENCE, "--generate", "9" * 20], 2, "a token id must be a whole number"),
        (["apply", "{}", *REFERENCE, "--generate", "1", "--new-tokens", "40000"], 2, "more than its 32768 positions"),
        (["apply", "{}", "--seed", str(2**64)], 2, "seed must be a whole number"),
        (["verify", "{}", "--seed", "-1"], 2, "seed must be a whole number"),
        (["bench", "{}", "--margin", "inf"], 2, "margin must be a finite number"),
        (["apply", "{}", "--margin", "nan"], 2, "--margin"),
        (["bench", "{}", "--tokens", "9" * 20], 2, "--tokens"),
        (["apply", "{}", "--device", "meta"], 2, "device 'meta' holds no weights"),
        (["explain", "{}", ""], 2, "no MoE-looking site at ''"),
        (["packs", "check", "{}/config.json"], 2, "config.json:1: not TOML"),
        (["report", "{}/config.json"], 2, "not the folder of a run"),
    ],
)
def test_bad_input_is_one_error_that_names_it(model: str, arguments: list[str], code: int, words: str) -> None:
    result = call(*(argument.replace("{}", model) for argument in arguments), exit_code=code)
    assert result.stdout == ""
    assert words in result.stderr
    assert "unexpected" not in result.stderr


def test_a_prompt_may_be_text_where_there_is_a_tokenizer(model: str, tmp_path: Path) -> None:
    arguments = ("apply", tmp_path / "tiny", *REFERENCE, "--prompt", "w1 w2", "--new-tokens", "2")
    shutil.copytree(model, tmp_path / "tiny")
    assert "no tokenizer is there" in call(*arguments, exit_code=2).stderr
    made = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "tiny")
    lines = call(*arguments).stdout.splitlines()
    given = data("apply", model, *REFERENCE, "--generate", "1,2", "--new-tokens", "2")["tokens"]["after"]["model"]
    assert any(f"'w{given[0]} w{given[1]}'" in line for line in lines)
    assert "give one" in call(*arguments, "--generate", "1", exit_code=2).stderr


@pytest.mark.parametrize("top_k", [9, 0, -1])
def test_a_block_that_asks_for_more_experts_than_there_are_isnt_replaced(
    model: str, top_k: int, tmp_path: Path
) -> None:
    config = json.loads((Path(model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    found = data("plan", tmp_path, *REFERENCE)
    assert [site["outcome"] for site in found["sites"]] == ["missed"] * 3
    assert found["sites"][0]["reason"] == f"it asks for the top {top_k} of 8, so it can't run"


def test_a_plan_is_bound_to_its_checkpoint_and_warns_of_versions(model: str, tmp_path: Path) -> None:
    path, other = tmp_path / "plan.json", tmp_path / "other"
    call("plan", model, *REFERENCE, "-o", path)
    plan = json.loads(path.read_text())
    plan["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(plan))
    assert "warning: the plan was made with other versions: torch 1.0, now" in call("verify", path).stderr
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, other / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps({**plan, "model": str(other)}))
    error = f"error: the plan was made for another checkpoint than {other}: it differs in the names, dtypes or shapes"
    assert error in call("apply", path, exit_code=2).stderr
    path.write_text(json.dumps({**plan, "checkpoint": None}))
    assert "the plan was changed" in call("apply", path, exit_code=2).stderr


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: moe_surgery.apply(m, "plan.json"),
        lambda m: moe_surgery.apply(m, seed=2**63, **DATA),
        lambda m: moe_surgery.apply(m, seed=True, **DATA),
        lambda m: moe_surgery.apply(m, margin="5", **DATA),
        lambda m: moe_surgery.apply(m, margin=float("nan"), **DATA),
        lambda m: moe_surgery.apply(m, undoable="no", **DATA),
        lambda m: moe_surgery.apply(m, typo=1),
        lambda m: moe_surgery.apply("a directory"),
        lambda m: moe_surgery.verify(5),
        lambda m: moe_surgery.scan(None),
        lambda m: moe_surgery.scan(""),
        lambda m: moe_surgery.plan(m, packs="generic"),
        lambda m: moe_surgery.plan(m, packs=[5]),
        lambda m: moe_surgery.plan(m, only="**"),
        lambda m: moe_surgery.plan(m, skip=[1]),
        lambda m: moe_surgery.plan(m, expect="3"),
        lambda m: moe_surgery.plan(m, expect=-1),
        lambda m: moe_surgery.plan(m, strict=1),
        lambda m: moe_surgery.plan(m, target=5),
        lambda m: moe_surgery.explain(m, 5),
        lambda m: moe_surgery.undo(None),
        lambda m: moe_surgery.Plan.load(5),
        lambda m: moe_surgery.Plan.from_json([]),
        lambda m: moe_surgery.install("generic"),
        lambda m: moe_surgery.install(target=5),
        lambda m: moe_surgery.install(prove="most"),
        lambda m: moe_surgery.install(on_failure="shrug"),
        lambda m: moe_surgery.install(run=5),
    ],
)
def test_wrong_types_are_one_error_of_the_library(live: nn.Module, wrong: Callable[[nn.Module], object]) -> None:
    before = {name: id(module) for name, module in live.named_modules()}
    with pytest.raises(moe_surgery.UsageError) as caught:
        wrong(live)
    assert "\n" not in str(caught.value)
    assert {name: id(module) for name, module in live.named_modules()} == before
