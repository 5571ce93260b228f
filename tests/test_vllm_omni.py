"""vllm-omni's Qwen3-Omni under surgery and an audit, where it is installed: it isn't among the pinned packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from engine_examples import environment
from hanging import HANG

from moe_surgery.engine.receipts import read_all
from moe_surgery.report.receipt import Receipt

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm_omni") is None, reason="no vllm-omni is installed")]

# vLLM's own worker, as vllm-omni has none for a CPU. Of a stage it builds what the others would.
STAGE = """
import sys
from vllm.v1.engine.llm_engine import LLMEngine
from vllm_omni.engine.arg_utils import OmniEngineArgs

LLMEngine.from_engine_args(OmniEngineArgs(
    model=sys.argv[1], model_stage=sys.argv[2], model_arch="Qwen3OmniMoeForConditionalGeneration",
    hf_config_name=f"{sys.argv[2]}_config", worker_cls="vllm.v1.worker.cpu_worker.CPUWorker",
    skip_tokenizer_init=True, dtype="float32", max_model_len=256, kv_cache_memory_bytes=1 << 26, enforce_eager=True,
    limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
))
"""
PIPELINE = """
import torch
import vllm_omni.entrypoints.omni
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.lingbot_video.lingbot_video_transformer import LingBotVideoSparseMoeBlock
from moe_surgery.engine import plugin

class Pipeline(torch.nn.Module):
    def __init__(self, *, od_config):
        super().__init__()
        self.ffn = LingBotVideoSparseMoeBlock(32, 8, 2, 16, "sigmoid", True, None, None, 2.5, 1)

registry.DiffusionModelRegistry._try_load_model_cls = lambda name: Pipeline
plugin.activate()
registry.initialize_model(OmniDiffusionConfig(model=".", model_class_name="Pipeline"))
"""


def started(tmp: Path, script: str, *arguments: str, orders: tuple[str, ...] = ("run",)) -> tuple[Receipt, str]:
    """What the only process of a run told, and all that was printed."""
    command = [Path(sys.executable).with_name("moe-surgery"), *orders, "--run", tmp / "run", "--", sys.executable, "-c"]
    more = environment(tmp, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    done = subprocess.run([*command, script, *arguments], env=more, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    [receipt] = read_all(tmp / "run")
    return receipt, done.stderr


@pytest.fixture
def checkpoint(omni_copy: Path) -> Path:
    """With what vLLM's vision tower reads of a published config."""
    config = json.loads((omni_copy / "config.json").read_text())
    config["thinker_config"]["vision_config"] |= {"apply_vit_abs_pos_embed": True, "image_size": 64}
    (omni_copy / "config.json").write_text(json.dumps(config))
    return omni_copy


def sites(receipt: Receipt, part: str) -> list[dict[str, Any]]:
    assert receipt.report is not None
    return [site for site in receipt.report["sites"] if site["path"].startswith(f"{part}.language_model.model.layers.")]


@pytest.mark.parametrize(("part", "other"), [("thinker", "talker"), ("talker", "thinker")])
def test_a_stage_is_operated_on_as_itself(part: str, other: str, checkpoint: Path, tmp_path: Path) -> None:
    orders = ("run", "--pack", "qwen3-omni", "--target", "folded", "--prove", "all")
    receipt, said = started(tmp_path, STAGE, str(checkpoint), part, orders=orders)
    assert receipt.model == f"Qwen3OmniMoeForConditionalGeneration.{part}"
    assert f"qwen3-omni/{other}: no module of {receipt.model} is where it looks" in said
    found = sites(receipt, part)
    assert [site["rule"] for site in found] == [f"qwen3-omni/{part}"] * 2
    if part == "talker":
        assert all(site["outcome"] == "replaced" and site["proof"]["passed"] for site in found)
    else:
        assert {site["outcome"] for site in found} == {"kept"}


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_a_stage_is_audited(part: str, checkpoint: Path, tmp_path: Path) -> None:
    receipt, _ = started(tmp_path, STAGE, str(checkpoint), part, orders=("audit",))
    assert [site["outcome"] for site in sites(receipt, part)] == ["right"] * 2
    assert receipt.report is not None
    assert [site["outcome"] for site in receipt.report["sites"]].count("not comparable") == 2  # the other part's


def test_a_pipeline_with_blocks_is_told_of(tmp_path: Path) -> None:
    receipt, said = started(tmp_path, PIPELINE)
    assert (receipt.model, receipt.outcome) == ("Pipeline", "unpatched")
    assert "ffn (LingBotVideoSparseMoeBlock) can't be operated on: vllm-omni's own loader built the model" in said
