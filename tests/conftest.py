"""What several test modules share: a real-format Qwen3-Omni checkpoint, small enough to be written once a run."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.make_checkpoint import CONFIGS, make
from hypothesis import settings
from make_qwen3_omni import write
from qwen3_omni_config import SMALL

# What is printed must not depend on the width that a terminal, or a test runner's worker, has.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)
# Tiny tensors gain nothing from more threads, which on a busy machine wait for each other.
torch.set_num_threads(1)
# The same examples in every run, so that a failure is the change's own; `make fuzz` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("fuzz", print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _imported_is_kept() -> None:
    """What was imported stays, so garbage collection need not walk it again and again: a tenth of most tests' time."""
    gc.freeze()


@pytest.fixture(scope="session")
def omni_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-Omni checkpoint in float32 with 2 talker and 2 thinker layers. Read only: copy it to change it."""
    directory = tmp_path_factory.mktemp("models") / "omni"
    write(directory, replace(SMALL, thinker=replace(SMALL.thinker, layers=2), talker=replace(SMALL.talker, layers=2)))
    return directory


@pytest.fixture
def omni_copy(omni_dir: Path, tmp_path: Path) -> Path:
    """A copy of :func:`omni_dir` to damage."""
    return Path(shutil.copytree(omni_dir, tmp_path / "omni"))


@pytest.fixture(scope="session")
def write_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a tiny Qwen2-MoE language model, once for each dtype asked for."""
    written: dict[str, Path] = {}

    def write_one(dtype: str) -> Path:
        if dtype not in written:
            from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

            config = Qwen2MoeConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
            )
            torch.manual_seed(0)
            written[dtype] = tmp_path_factory.mktemp("models") / f"tiny-{dtype}"
            Qwen2MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(written[dtype])
        return written[dtype]

    return write_one


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each example model for engines, by kind; "stacked" is unfused_qwen2 with 3-D experts."""
    root = tmp_path_factory.mktemp("engine-models")
    for kind in CONFIGS:
        make(kind, root / kind)
    make("unfused_qwen2", root / "stacked", fused=True)
    return {kind: root / kind for kind in [*CONFIGS, "stacked"]}
