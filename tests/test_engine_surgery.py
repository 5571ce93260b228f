"""Engines that are operated on compute what transformers computes, however they run, and tell what was done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.make_checkpoint import CONFIGS
from engine_examples import Result, Run, run_all
from engine_reference import check, reference
from safetensors.torch import load_file, save_file

from moe_surgery.engine.timing.graphs import own_graphs

LAYERS = 3
# Prompts of five and four tokens then take two steps each, beside the other's decoding.
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 3, "max_num_seqs": 2}
COMPILED = {"enforce_eager": False}


def operated(folder: Path, tmp: Path, name: str, **options: Any) -> Run:
    return Run(str(folder), options, {"run": str(tmp / name), "prove": "all"})


def check_operated(result: Result, ranks: int = 1) -> None:
    """Every rank replaced and proved every block, and accounts for every weight."""
    paths = [path.removeprefix("talker.") for path, _ in result.steps]
    assert paths == [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]
    assert {outcome for _, outcome in result.steps} == {"replaced"}
    assert [receipt["rank"] for receipt in result.receipts] == list(range(ranks))
    for receipt in result.receipts:
        assert receipt["outcome"] == "operated" and receipt["ledger"] is not None
        for site in receipt["report"]["sites"]:
            assert site["proof"]["passed"] and site["proof"]["margin"] > 5
            assert len(site["proof"]["mutants"]) >= 10


@pytest.mark.slow
def test_eager_and_with_chunked_prefill(folders: dict[str, Path], tmp_path: Path) -> None:
    kinds = list(folders)
    runs = [operated(folders[kind], tmp_path, kind) for kind in kinds]
    runs += [operated(folders[kind], tmp_path, f"{kind}-chunked", **CHUNKED) for kind in kinds]
    for kind, result in zip(kinds * 2, run_all(runs, tmp_path), strict=True):
        assert result.error is None
        check_operated(result)
        check(result.outputs, reference("unfused_qwen2" if kind == "stacked" else kind, folders[kind]))


def compiled(kind: str, folder: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
    """Engines in turn whose graphs are kept in one cache; "plain" is without surgery.

    On a CPU, vLLM 0.32 fails to load what it kept, with or without surgery, and compiles again: a second engine of a
    sort takes as long as the first.
    """
    runs = [
        Run(str(folder), COMPILED) if name == "plain" else operated(folder, tmp_path, name, **COMPILED)
        for name in order
    ]
    cache = tmp_path / "cache"
    for run, result in zip(runs, run_all(runs, tmp_path, VLLM_CACHE_ROOT=own_graphs(cache)), strict=True):
        assert result.error is None
        if run.surgery is not None:
            check_operated(result)
        check(result.outputs, reference(kind, folder))
    # Graphs that were kept lie under the hash of their config: one place for the plain model, another for the operated.
    kept = [place for place in cache.rglob("*") if place.name.startswith("rank_0")]
    assert len({place.parent for place in kept}) == 2, kept


@pytest.mark.slow
def test_compiled_with_a_cache_that_the_other_variant_warmed(folders: dict[str, Path], tmp_path: Path) -> None:
    compiled("naive_talker", folders["naive_talker"], tmp_path, ("plain", "cold", "plain", "warm"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("list_moe_whole", "naive_talker")])
def test_compiled_before_the_plain_variant(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    compiled(kind, folders[kind], tmp_path, ("operated", "plain"))


@pytest.mark.slow
def test_parallel(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each engine in processes of its own, begun by one that has none in it. Ranks share every block's experts.

    Each stage of a pipeline operates on its own layers. (vLLM 0.32 can't serve so on CPU, with or without surgery.)
    """
    kinds = [kind for kind in CONFIGS if kind != "omni_talker"]
    runs = [operated(folders[kind], tmp_path, f"{kind}-tp2", tensor_parallel_size=2) for kind in kinds]
    stages = Run(str(folders["naive_talker"]), {"pipeline_parallel_size": 2}, {"run": str(tmp_path / "pp2")}, ask=False)
    *ranks, staged = run_all([*runs, stages], tmp_path, forked=True)
    for kind, result in zip(kinds, ranks, strict=True):
        assert result.error is None, kind
        check_operated(result, ranks=2)
        sites = result.receipts[0]["report"]["sites"]
        names = {mutant["name"] for site in sites for mutant in site["proof"]["mutants"]}
        assert any("twice" in name for name in names) and any("not reduced" in name for name in names)
        check(result.outputs, reference(kind, folders[kind]))
    assert staged.error is None
    told = {receipt["stage"]: receipt for receipt in staged.receipts}
    paths = [site["path"] for stage in (0, 1) for site in told[stage]["report"]["sites"]]
    assert paths == [f"model.layers.{layer}.mlp" for layer in range(LAYERS)]
    assert {receipt["outcome"] for receipt in staged.receipts} == {"operated"}


@pytest.mark.slow
def test_vllms_own_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its own classes have fused blocks. Its Transformers backend fuses some families, and leaves others to us."""
    from transformers import (
        AutoModelForCausalLM,
        Cohere2MoeConfig,
        Ernie4_5_MoeConfig,
        HunYuanMoEV1Config,
        Qwen2MoeConfig,
    )

    common = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "tie_word_embeddings": False,
    }
    configs = {
        "qwen2": Qwen2MoeConfig(
            **common, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
        ),
        "cohere2": Cohere2MoeConfig(**common, num_experts_per_tok=2, num_shared_experts=1),
        "hunyuan": HunYuanMoEV1Config(**common, moe_topk=2),
        "ernie": Ernie4_5_MoeConfig(
            **{name: value for name, value in common.items() if name not in ("num_experts", "head_dim")},
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=32,
            moe_num_shared_experts=1,
            moe_layer_start_index=0,
            moe_layer_end_index=1,
        ),
    }
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # so that tokens depend on the blocks
            for parameter in models[name].parameters():
                parameter.mul_(3)
                if not parameter.any():  # correction biases and some routers
                    parameter.uniform_(-0.05, 0.05)
        models[name].save_pretrained(tmp_path / name)
    backend = {"model_impl": "transformers"}
    runs = [operated(tmp_path / name, tmp_path, f"{name}-backend", **backend) for name in configs]
    # Each in a process that ran no engine before, as it is started: what one leaves behind may hide the other's faults.
    finished = [run_all([run], tmp_path)[0] for run in runs[1:]]
    own, qwen = run_all([operated(tmp_path / "qwen2", tmp_path, "own"), runs[0]], tmp_path)
    for name, result in {"qwen2": own, **dict(zip(list(configs)[1:], finished, strict=True))}.items():
        assert result.error is None
        check(result.outputs, lambda ids, model=models[name]: model(ids).logits)
    for result in (own, qwen):
        assert result.receipts[0]["outcome"] == "kept"
        sites = result.receipts[0]["report"]["sites"]
        assert [(site["outcome"], site["reason"]) for site in sites] == [("kept", "already fused")] * 2
    for result in finished:
        sites = result.receipts[0]["report"]["sites"]
        assert [site["outcome"] for site in sites] == ["replaced"] * 2
        assert all(site["spec"]["shared"] and site["proof"]["passed"] for site in sites)


def quantise_attention(folder: Path, out: Path) -> Path:
    """A copy whose attention has int8 weights; the blocks are as they were."""
    shutil.copytree(folder, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in out.glob("*.safetensors"):
        shard = load_file(file)
        for name in [name for name in shard if "self_attn" in name and name.endswith("proj.weight")]:
            scale = shard[name].abs().amax(1, keepdim=True).float() / 127
            shard |= {name: (shard[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
            index["weight_map"][f"{name}_scale"] = file.name
        save_file(shard, file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**plain, "strategy": "channel", "dynamic": False},
        "input_activations": {**plain, "strategy": "token", "dynamic": True},
    }
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*mlp.*", "lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.slow
def test_plain_blocks_in_a_quantised_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = quantise_attention(folders["unfused_qwen2"], tmp_path / "int8")
    with_surgery, without = run_all([operated(folder, tmp_path, "run"), Run(str(folder))], tmp_path)
    assert with_surgery.error is None
    check_operated(with_surgery)
    for output, expected in zip(with_surgery.outputs, without.outputs, strict=True):
        assert output.tokens == expected.tokens
        torch.testing.assert_close(
            torch.tensor(output.prompt_logprobs), torch.tensor(expected.prompt_logprobs), rtol=0, atol=1e-4
        )
