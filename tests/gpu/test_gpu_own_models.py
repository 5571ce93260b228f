"""Models that vLLM has fused itself, on GPUs: this library's kernels replace its layer, and tokens stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import own_models
import pytest
import torch
from engine_examples import Result, Run, distance, run_all
from quantised_checkpoint import write as quantised
from safetensors.torch import load_file, save_file
from test_gpu_engine import COMPILED, EXACT, check_operated, check_same, operated, two_gpus
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

PLAIN = ("qwen2_moe", "qwen3_moe", "mixtral", "aria")
"""Routers that the kernels compute, with a shared expert and without one."""
OWN = ("glm4_moe", "ernie4_5_moe", "exaone_moe", "deepseek_v2")
"""Routers that stay vLLM's: groups, correction biases, scores of a sigmoid."""
ENV = {**EXACT, "VLLM_MLA_DISABLE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in (*PLAIN, *OWN):
        own_models.write(name, folder / name)
    return folder


def run_of(models: Path, name: str, tmp: Path, target: str = "folded", **options: object) -> Run:
    more = own_models.OPTIONS.get(name, {}) | options
    return operated(models / name, tmp / f"{name}-{target}", target, **more)


def check_near(found: Result, plain: Result) -> None:
    """Within the noise of two bytes: one expert fewer for each token is several times as far."""
    for one, other in zip(found.outputs, plain.outputs, strict=True):
        assert distance(one.prompt_logprobs, other.prompt_logprobs) < 0.1 * torch.tensor(other.prompt_logprobs).std()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLAIN, *OWN])
def test_eager(name: str, models: Path, tmp_path: Path) -> None:
    run = run_of(models, name, tmp_path)
    found, plain = run_all([run, replace(run, surgery=None)], tmp_path, **ENV)
    check_operated(found, "folded")
    check_same(found.outputs, plain.outputs)
    said = {site["reason"].split(" top-")[0] for site in found.receipts[0]["report"]["sites"]}
    assert said == {"its own" if name in OWN else "softmax"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_compiled_in_graphs_from_one_cache(name: str, models: Path, tmp_path: Path) -> None:
    """Graphs with surgery and without lie in one folder. What wasn't timed against vLLM's layer stays as it was."""
    runs = [run_of(models, name, tmp_path, target, **COMPILED) for target in ("folded", "auto")]
    runs.append(replace(runs[0], surgery=None))
    found, kept, plain = run_all(runs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"), **ENV)
    check_operated(found, "folded")
    check_same(found.outputs, plain.outputs)
    assert kept.outputs == plain.outputs  # to the last bit
    for site in kept.receipts[0]["report"]["sites"]:
        assert site["outcome"] == "kept" and "weren't timed against vLLM's at its size" in site["reason"]


@pytest.mark.slow
def test_a_router_in_float32_before_experts_in_bfloat16(models: Path, tmp_path: Path) -> None:
    run = run_of(models, "glm4_moe", tmp_path, dtype="bfloat16", **COMPILED)
    found, plain = run_all([run, replace(run, surgery=None)], tmp_path, **ENV)
    check_operated(found, "folded")
    check_near(found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe"])
def test_a_block_of_which_nothing_can_be_proven_stays(name: str, tmp_path: Path) -> None:
    """With an expert that gives nothing, no answer tells its block from one without it. Others of its kind stay too."""
    own_models.write(name, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    layer = min(key for key in weights if key.endswith("mlp.experts.3.down_proj.weight"))
    weights[layer].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    run = operated(tmp_path / "model", tmp_path / "run", "folded", **COMPILED)
    found, plain = run_all([run, replace(run, surgery=None)], tmp_path, **ENV)
    assert found.error is None and found.outputs == plain.outputs  # to the last bit
    for site in found.receipts[0]["report"]["sites"]:
        assert site["outcome"] == "kept" and "it can't be proven" in site["reason"] and "expert 3" in site["reason"]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products of e4m3"
)
def test_in_fp8(tmp_path: Path) -> None:
    """With a scale for each block; what wasn't timed against vLLM's layer stays, unless it is to be folded."""
    sizes = {"hidden_size": 1024, "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(shared_expert_intermediate_size=512, norm_topk_prob=True, **sizes, **heads)
    )
    for weight in (parameter.data for parameter in model.parameters() if parameter.ndim > 1):
        weight.normal_(std=weight.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantised(tmp_path / "source", tmp_path / "model", "fp8_block", group=128)
    options = {**COMPILED, "dtype": "bfloat16"}
    runs = [operated(tmp_path / "model", tmp_path / target, target, **options) for target in ("folded", "auto")]
    found, kept, plain = run_all([*runs, replace(runs[0], surgery=None)], tmp_path)
    check_operated(found, "folded")
    assert all(site["proof"]["reference"] == "weights" for site in found.receipts[0]["report"]["sites"])
    check_near(found, plain)
    assert kept.outputs == plain.outputs
    for site in kept.receipts[0]["report"]["sites"]:
        assert site["outcome"] == "kept" and "weren't timed against vLLM's" in site["reason"]


@pytest.mark.slow
@two_gpus
@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe"])
def test_tensor_parallel(name: str, models: Path, tmp_path: Path) -> None:
    run = run_of(models, name, tmp_path, tensor_parallel_size=2, **COMPILED)
    env = {**ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    [found] = run_all([run], tmp_path, **env)
    [plain] = run_all([replace(run, surgery=None)], tmp_path, **env)
    check_operated(found, "folded", ranks=2)
    check_same(found.outputs, plain.outputs)
