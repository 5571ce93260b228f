"""Tuning on a GPU: the command stores a table for a model's shape, which is used and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from moe_surgery.kernels.choice import own_folder, read_table

ROOT = Path(__file__).parents[2]


def test_the_command_stores_a_table_that_is_used(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig

    sizes = {"hidden_size": 512, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
    Qwen2MoeConfig(
        **sizes, num_experts=16, num_experts_per_tok=4, num_hidden_layers=2, vocab_size=64, num_attention_heads=8,
        num_key_value_heads=8, architectures=["Qwen2MoeForCausalLM"], dtype="bfloat16",
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "cli.py", "tune", str(tmp_path / "model"), "--tokens", "1", "--tokens", "64"]
    words += ["--seconds", "20", "--format", "json"]
    told = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (table,) = json.loads(told.stdout)["tables"]
    assert table["shape"] == "H512-E16-I128-K4-M2" and table["blocks"] == 2
    assert [row["tokens"] for row in table["rows"]] == [1, 64]
    assert all(row["us"] <= row["before_us"] for row in table["rows"])
    path = (
        tmp_path / "moe-surgery" / "kernels" / own_folder(torch.cuda.get_device_name()).name / f"{table['shape']}.json"
    )
    assert str(path) == table["file"] and read_table(path)[0].tokens == 1
    script = (
        "import torch, moe_surgery; from moe_surgery.kernels.choice import table; from transformers import AutoConfig, "
        f"AutoModelForCausalLM as M; m = M.from_config(AutoConfig.from_pretrained({str(tmp_path / 'model')!r}), "
        "dtype=torch.bfloat16).cuda().eval(); r = moe_surgery.apply(m, target='folded'); "
        f"assert len(r.replaced) == 2, r; assert table({table['shape']!r})"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
