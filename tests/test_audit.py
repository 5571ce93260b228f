"""The audit of what vLLM itself built: right layers are right, and each mistake is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from audit_families import FAULTS, Audited, Case, audits
from engine_examples import Run, environment, run_all
from hanging import HANG
from own_models import ARIA, write
from own_process import run_apart
from test_documents import ROOT, fenced

import moe_surgery
from moe_surgery.errors import UsageError

RIGHT = ("deepseek_v3", "qwen2_moe", "mixtral", "llama4", "granitemoeshared", "hunyuan_v1_moe", ARIA)
STOPPED = "stopped"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    tmp = tmp_path_factory.mktemp("checkpoints")
    for family in (*RIGHT, "ernie4_5_moe"):
        write(family, tmp / family)
    return {family: tmp / family for family in (*RIGHT, "ernie4_5_moe")}


@pytest.fixture(scope="module")
def audited(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Audited]:
    """By family, and by fault in a DeepSeek-V3."""
    broken = "deepseek_v3", str(folders["deepseek_v3"])
    cases = {family: Case(family, str(folder)) for family, folder in folders.items()}
    cases |= {fault: Case(*broken, fault) for fault in FAULTS}
    cases[STOPPED] = Case(*broken, "expert 3 zeroed", "stop")
    found = audits(list(cases.values()), tmp_path_factory.mktemp("audits"))
    return dict(zip(cases, (ranks[0] for ranks in found), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", RIGHT)
def test_a_layer_of_vllms_is_right(audited: Mapping[str, Audited], family: str) -> None:
    assert {site["outcome"] for site in audited[family].sites} == {"right"}
    assert all(site["proof"]["margin"] > 1000 for site in audited[family].sites)
    assert audited[family].receipt is not None and audited[family].receipt["exit_code"] == 0


@pytest.mark.slow
def test_a_correction_bias_that_vllm_forgets_is_found(audited: Mapping[str, Audited]) -> None:
    [site] = audited["ernie4_5_moe"].sites
    assert (site["path"], site["outcome"]) == ("model.layers.1.mlp", "wrong")
    assert site["reason"].startswith("correction bias left out: it is ")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_layer_is_wrong_and_its_fault_named(audited: Mapping[str, Audited], fault: str) -> None:
    [site] = audited[fault].sites
    assert site["outcome"] == "wrong"
    assert site["reason"].startswith(f"{fault}: it is ")
    assert audited[fault].receipt is not None
    assert (audited[fault].receipt["outcome"], audited[fault].receipt["exit_code"]) == ("audited", 12)


@pytest.mark.slow
def test_the_library_audits_as_the_page_says(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (block,) = fenced(ROOT / "docs" / "audit.md", "python")
    more = "max_model_len=256, kv_cache_memory_bytes=1 << 26, skip_tokenizer_init=True, enforce_eager=True"
    code = block.replace("vllm.LLM(...)", f"vllm.LLM({str(folders['mixtral'])!r}, {more})")
    code += "    assert [(told.outcome, told.exit_code) for told in handle.receipts()] == [('audited', 0)]\n"
    run_apart(exec, code, env=environment(tmp_path), log=tmp_path / "log.txt", seconds=HANG)


@pytest.mark.slow
def test_a_wrong_layer_stops_the_engine(audited: Mapping[str, Audited]) -> None:
    case = audited[STOPPED]
    assert case.error is not None and case.receipt is not None
    assert case.error.startswith("ProofError: model.layers.1.mlp is wrong: expert 3 zeroed: ")
    assert (case.receipt["outcome"], case.receipt["exit_code"]) == ("failed", 12)


@pytest.mark.slow
def test_under_tensor_parallelism_the_sum_of_all_ranks_is_judged(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Aria's shared expert is summed up by itself, and once more with the routed ones."""
    found = audits([Case(family, str(folders[family])) for family in ("qwen2_moe", ARIA)], tmp_path, 2)
    for ranks, outcome in zip(found, ("right", "wrong"), strict=True):
        assert [{site["outcome"] for site in rank.sites} for rank in ranks] == [{outcome}] * 2
    [reasons] = [{site["reason"].partition(":")[0] for site in rank.sites} for rank in found[1][:1]]
    assert reasons == {"shared expert doubled or shared expert reduced twice"}


@pytest.mark.slow
def test_the_command_ends_with_12_where_a_layer_is_wrong(folders: Mapping[str, Path], tmp_path: Path) -> None:
    options = "skip_tokenizer_init=True, dtype='float32', max_model_len=64, kv_cache_memory_bytes=1 << 26"
    options += ", enforce_eager=True, distributed_executor_backend='uni'"
    script = f"from vllm import LLM; LLM({str(folders['ernie4_5_moe'])!r}, {options}); print('served')"
    command = [sys.executable, "-c", "from moe_surgery.cli import main; main()", "audit"]
    command += ["--on-failure", "keep", "--format", "json", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        [*command, "--run", str(tmp_path / "run"), "--", sys.executable, "-c", script],
        env=environment(tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 12, done.stderr
    assert "served" in done.stdout
    assert "moe-surgery: audited Ernie4_5_MoeForCausalLM: 0 right, 1 wrong, 0 not comparable" in done.stderr
    assert "error: Ernie4_5_MoeForCausalLM: model.layers.1.mlp is wrong: correction bias left out: " in done.stderr
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["exit"] == 12
    [receipt] = data["receipts"]
    assert receipt["report"]["done"] == "audited"


@pytest.mark.slow
def test_an_installed_audit_leaves_the_model_alone(folders: Mapping[str, Path], tmp_path: Path) -> None:
    [result] = run_all([Run(str(folders["mixtral"]), {"max_model_len": 64}, {"audit": True}, ask=False)], tmp_path)
    assert result.error is None
    assert result.steps == [(f"model.layers.{layer}.block_sparse_moe", "right") for layer in (0, 1)]
    [receipt] = result.receipts
    assert (receipt["outcome"], receipt["fingerprint"]) == ("audited", None)


@pytest.mark.slow
def test_a_draft_model_is_audited_by_itself(folders: Mapping[str, Path], tmp_path: Path) -> None:
    draft = {"method": "draft_model", "model": str(folders["mixtral"]), "num_speculative_tokens": 2}
    options = {"max_model_len": 64, "speculative_config": draft}
    [result] = run_all([Run(str(folders["qwen2_moe"]), options, {"audit": True}, ask=False)], tmp_path)
    assert result.error is None
    audited = {receipt["model"]: receipt["report"]["sites"] for receipt in result.receipts}
    assert audited.keys() == {"Qwen2MoeForCausalLM", "MixtralForCausalLM"}
    assert all(site["outcome"] == "right" for sites in audited.values() for site in sites)


@pytest.mark.parametrize(
    "more",
    [{"plan_or_packs": ["qwen3-omni"]}, {"target": "folded"}, {"prove": "all"}],
    ids=["packs", "target", "prove"],
)
def test_an_audit_takes_nothing_that_a_swap_needs(more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="an audit replaces nothing"):
        moe_surgery.install(audit=True, **more)  # type: ignore[arg-type]


def test_no_block_is_asked_where_ranks_exchange_tokens(folders: Mapping[str, Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from moe_surgery.engine.model.audit_truth import Incomparable, truth_of

    config = EngineArgs(str(folders["mixtral"]), skip_tokenizer_init=True, data_parallel_size=2).create_engine_config()
    with pytest.raises(Incomparable, match="under data or sequence parallelism"):
        truth_of(config, config.model_config)
