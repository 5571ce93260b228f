"""vLLM engines on GPUs: surgery puts this library's kernels in, and tokens are those of the engine without surgery."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.make_checkpoint import COMMON, CONFIGS, VOCAB, make
from engine_examples import Output, Result, Run, distance, run_all

EXACT = {"TRITON_F32_DEFAULT": "ieee"}
"""Without it Triton rounds vLLM's products of float32 to TF32, and nothing could be compared beyond three digits."""
COMPILED = {"enforce_eager": False, "max_num_seqs": 4}  # few sizes of a batch are few graphs
PUSHES = ("load_weights", "reload_weights by path", "by name", "weight_loader", "sleep without a copy")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


def operated(folder: Path, run: Path, target: str = "auto", **options: Any) -> Run:
    return Run(str(folder), options, {"run": str(run), "prove": "all", "target": target})


def check_operated(result: Result, target: str, ranks: int = 1) -> None:
    assert result.error is None
    assert [receipt["rank"] for receipt in result.receipts] == list(range(ranks))
    for receipt in result.receipts:
        assert receipt["report"]["versions"]["GPU"] == torch.cuda.get_device_name()
        sites = receipt["report"]["sites"]
        assert [(site["outcome"], site["target"]) for site in sites] == [("replaced", target)] * len(sites) != []
        assert all(site["proof"]["passed"] and site["proof"]["margin"] > 5 for site in sites)


def check_same(found: list[Output], wanted: list[Output]) -> None:
    """The same tokens, and log-probabilities that differ by no more than float32's noise after some layers."""
    assert [each.tokens for each in found] == [each.tokens for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        pairs = zip(one.logprobs + one.prompt_logprobs, other.logprobs + other.prompt_logprobs, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_eager(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    [found] = run_all([operated(folders[kind], tmp_path / "run")], tmp_path, **EXACT)
    [plain] = run_all([Run(str(folders[kind]))], tmp_path, **EXACT)
    check_operated(found, "folded")
    check_same(found.outputs, plain.outputs)


@pytest.mark.slow
def test_compiled_in_graphs_from_one_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """Graphs of engines with surgery, with another target and without it lie in one folder; each takes its own."""
    folder, env = folders["naive_talker"], {**EXACT, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    targets = ("folded", "vllm")
    runs = [operated(folder, tmp_path / target, target, **COMPILED) for target in targets]
    runs += [Run(str(folder), COMPILED), operated(folder, tmp_path / "again", **COMPILED)]
    *first, plain, again = run_all(runs, tmp_path, **env)
    for target, result in zip((*targets, "folded"), (*first, again), strict=True):
        check_operated(result, target)
        check_same(result.outputs, plain.outputs)


@pytest.mark.slow
def test_an_engine_that_goes_on_after_a_failure(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its second block isn't proven, as the first was: it is as it was, beside graphs of an engine with surgery."""
    folder, env = folders["naive_talker"], {**EXACT, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    failing = operated(folder, tmp_path / "kept", **COMPILED)
    assert failing.surgery is not None
    failing = replace(failing, surgery={**failing.surgery, "on_failure": "keep"}, fault="proof")
    swapped, kept, plain = run_all(
        [operated(folder, tmp_path / "run", **COMPILED), failing, Run(str(folder), COMPILED)], tmp_path, **env
    )
    check_operated(swapped, "folded")
    [receipt] = kept.receipts
    assert receipt["outcome"] == "unpatched" and "the proof failed" in receipt["error"]
    assert kept.error is None and kept.outputs == plain.outputs  # to the last bit


@pytest.mark.slow
def test_a_layer_that_rounds_float32_is_not_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    [result] = run_all([operated(folders["naive_talker"], tmp_path / "run", "vllm")], tmp_path)
    assert result.error is None
    for site in result.receipts[0]["report"]["sites"]:
        assert site["outcome"] == "refused" and "vLLM's kernels round float32 to TF32 here" in site["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["folded", "vllm"])
def test_no_push_and_no_sleep_changes_an_operated_model(target: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Graphs find the weights where they were, once the engine is awake again."""
    make("naive_talker", tmp_path / "other", seed=1)
    run = operated(folders["naive_talker"], tmp_path / "run", target, enable_sleep_mode=True, **COMPILED)
    [found] = run_all([replace(run, push=str(tmp_path / "other"), ways=PUSHES, sleeps=True)], tmp_path, **EXACT)
    check_operated(found, target)
    asked, awake = found.outputs[:2], found.outputs[2:]
    assert asked == awake  # to the last bit
    assert set(found.pushes) == set(PUSHES)
    for way, (told, after) in found.pushes.items():
        assert "nothing was changed" in told, (way, told)
        assert [Output(**answer) for answer in after] == asked, way


@pytest.mark.slow
def test_a_model_that_crosses_over_to_vllms_experts(tmp_path: Path) -> None:
    """Two layers of the size of Qwen2-57B-A14B, where vLLM's experts are faster at 256 tokens, by the table."""
    sizes = {"hidden_size": 3584, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 2}
    config = {**CONFIGS["naive_talker"], **COMMON, **sizes, **heads, "shared_expert_intermediate_size": 20480}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = {**COMPILED, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 512}
    prompts = tuple(tuple((17 * at * at + 5 * at) % VOCAB for at in range(length)) for length in (12, 300))
    run = replace(operated(tmp_path, tmp_path / "run", **options), prompts=prompts, scaled=True)
    [found] = run_all([run], tmp_path)
    [plain] = run_all([replace(run, surgery=None)], tmp_path)
    check_operated(found, "folded")
    [reason] = {site["reason"] for site in found.receipts[0]["report"]["sites"]}
    assert "vLLM's experts, which are faster there, for 256 to 1023 tokens" in reason
    for one, other in zip(found.outputs, plain.outputs, strict=True):
        noise = distance(one.prompt_logprobs, other.prompt_logprobs)
        # one expert fewer for each token is twice as far and more
        assert 0 < noise < 0.1 * torch.tensor(other.prompt_logprobs).std()


@pytest.mark.slow
@two_gpus
@pytest.mark.parametrize("kind", ["naive_talker", "list_moe_whole"])
def test_tensor_parallel(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, **COMPILED}
    env = {**EXACT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    [result] = run_all([operated(folders[kind], tmp_path / "run", **options)], tmp_path, **env)
    [plain] = run_all([Run(str(folders[kind]), options)], tmp_path, **env)
    check_operated(result, "folded", ranks=2)
    check_same(result.outputs, plain.outputs)


@pytest.mark.slow
@two_gpus
def test_tensor_parallel_at_the_talkers_size(tmp_path: Path) -> None:
    """In float32 the tokens are the same. In bfloat16 they are as near to float32's as without surgery."""
    from talker_checkpoint import VOCABULARY, write

    write(tmp_path / "model", 4)
    env = {**EXACT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    prompts = (tuple((17 * at * at + 5 * at) % VOCABULARY for at in range(200)), (3, 17, 90, 41, 5), (7, 2))

    def result(dtype: str, surgery: bool) -> Result:
        folder = tmp_path / f"{dtype} {surgery}"
        folder.mkdir()
        run = operated(tmp_path / "model", folder / "run", dtype=dtype, tensor_parallel_size=2, **COMPILED)
        run = replace(run, prompts=prompts, surgery=run.surgery if surgery else None)
        [found] = run_all([run], folder, VLLM_CACHE_ROOT=str(tmp_path / f"cache {dtype}"), **env)
        return found

    cases = [(dtype, surgery) for dtype in ("float32", "bfloat16") for surgery in (True, False)]
    with ThreadPoolExecutor(len(cases)) as pool:  # an engine takes the better part of a minute to start
        swapped, plain, folded, coarse = pool.map(result, *zip(*cases, strict=True))
    check_operated(swapped, "folded", ranks=2)
    check_operated(folded, "folded", ranks=2)
    check_same(swapped.outputs, plain.outputs)
    [exact, noisy, new] = [each.outputs[0].prompt_logprobs for each in (plain, coarse, folded)]
    assert 0 < distance(new, exact) < 1.5 * distance(noisy, exact)


@pytest.mark.slow
@two_gpus
def test_expert_parallelism(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    env = {**EXACT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    [result] = run_all([operated(folders["naive_talker"], tmp_path / "run", "vllm", **options)], tmp_path, **env)
    [plain] = run_all([Run(str(folders["naive_talker"]), options)], tmp_path, **env)
    check_operated(result, "vllm", ranks=2)
    check_same(result.outputs, plain.outputs)
