"""The example checkpoint is Qwen3-Omni in all but size, and the full size can be planned from its config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_qwen3_omni
import pytest
import torch
from make_qwen3_omni import write
from qwen3_omni_config import FULL, SMALL, omni_config
from safetensors import safe_open

from moe_surgery.models.checkpoint import checkpoint_headers
from moe_surgery.models.opening import load_model, open_meta

ROOT = Path(__file__).resolve().parent.parent

# Names from the published index, with N layers and E experts, one of every kind that a MoE layer has.
PUBLISHED = [
    "talker.model.layers.1.mlp.experts.15.gate_proj.weight",
    "talker.model.layers.1.mlp.experts.15.up_proj.weight",
    "talker.model.layers.1.mlp.experts.15.down_proj.weight",
    "talker.model.layers.1.mlp.gate.weight",
    "talker.model.layers.1.mlp.shared_expert.gate_proj.weight",
    "talker.model.layers.1.mlp.shared_expert.up_proj.weight",
    "talker.model.layers.1.mlp.shared_expert.down_proj.weight",
    "talker.model.layers.1.mlp.shared_expert_gate.weight",
    "talker.model.codec_embedding.weight",
    "talker.codec_head.weight",
    "talker.text_projection.linear_fc1.weight",
    "talker.hidden_projection.linear_fc2.bias",
    "talker.code_predictor.lm_head.14.weight",
    "talker.code_predictor.model.codec_embedding.14.weight",
    "thinker.model.layers.1.mlp.experts.0.gate_proj.weight",
    "thinker.model.layers.1.mlp.gate.weight",
    "thinker.lm_head.weight",
    "thinker.audio_tower.layers.0.self_attn.q_proj.weight",
    "thinker.visual.blocks.0.attn.qkv.weight",
    "code2wav.decoder.0.conv.weight",
    "code2wav.pre_transformer.layers.0.self_attn.q_proj.weight",
]


def test_published_names_in_sharded_files(omni_dir: Path) -> None:
    headers = checkpoint_headers(omni_dir)
    assert [name for name in PUBLISHED if name not in headers] == []
    experts = {name: shape for name, (_, shape) in headers.items() if ".experts." in name}
    assert len(experts) == 2 * 2 * 16 * 3
    assert {len(shape) for shape in experts.values()} == {2}
    assert len(list(omni_dir.glob("model-0000?-of-0000?.safetensors"))) > 1
    assert (omni_dir / "model.safetensors.index.json").exists()


def test_structure_is_the_published_one_but_for_the_sizes() -> None:
    small, full = omni_config(SMALL), omni_config(FULL)

    def fields(config: dict[str, object]) -> dict[str, object]:
        return {key: fields(value) if isinstance(value, dict) else None for key, value in config.items()}

    assert fields(small) == fields(full)
    for config, hidden in ((small, 64), (full, 1024)):
        talker, thinker = config["talker_config"]["text_config"], config["thinker_config"]["text_config"]
        assert talker["hidden_size"] == hidden
        assert talker["num_hidden_layers"] == 20
        assert talker["num_experts_per_tok"] == 6
        assert thinker["num_experts_per_tok"] == 8
        assert talker["shared_expert_intermediate_size"] == 2 * talker["moe_intermediate_size"]
        assert talker["norm_topk_prob"]


def test_full_size_parameters(tmp_path: Path) -> None:
    """30.5 billion parameters in the thinker's language model and 35.3 in all, as published."""
    (tmp_path / "config.json").write_text(json.dumps(omni_config(FULL)))
    module = open_meta(str(tmp_path)).module
    language = [*module.thinker.model.parameters(), *module.thinker.lm_head.parameters()]
    assert sum(p.numel() for p in language) == pytest.approx(30.53e9, rel=1e-3)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(35.26e9, rel=1e-3)


def test_same_seed_same_bytes(omni_dir: Path, tmp_path: Path) -> None:
    sizes = replace(SMALL, thinker=replace(SMALL.thinker, layers=2), talker=replace(SMALL.talker, layers=2))
    write(tmp_path / "again", sizes)
    write(tmp_path / "other", sizes, seed=1)
    names = sorted(file.name for file in omni_dir.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == names
    assert all((tmp_path / "again" / name).read_bytes() == (omni_dir / name).read_bytes() for name in names)
    shard = next(name for name in names if name.endswith(".safetensors"))
    assert (tmp_path / "other" / shard).read_bytes() != (omni_dir / shard).read_bytes()


@torch.no_grad()
def test_every_expert_matters(omni_dir: Path) -> None:
    """Zeroing any expert of the last talker layer moves some logits by more than a thousandth, far above rounding."""
    talker = load_model(str(omni_dir)).module.talker
    embeds = talker.get_input_embeddings()(torch.arange(64)[None])
    before = talker(inputs_embeds=embeds).logits
    down = talker.model.layers[-1].mlp.experts.down_proj
    for expert in range(down.shape[0]):
        saved = down[expert].clone()
        down[expert] = 0
        moved = (talker(inputs_embeds=embeds).logits - before).norm(dim=-1) / before.norm(dim=-1)
        down[expert] = saved
        assert moved.max() > 1e-3, expert


def test_it_speaks(omni_dir: Path) -> None:
    """The whole published pipeline runs: text from the thinker, codes from the talker, a waveform from code2wav."""
    model = load_model(str(omni_dir)).module
    config = model.config
    turn = [config.im_start_token_id, config.user_token_id, 5, 6, config.im_end_token_id]
    ids = torch.tensor([[*turn, config.im_start_token_id, config.assistant_token_id, 7]])
    text, sound = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        speaker="ethan",
        thinker_max_new_tokens=4,
        thinker_do_sample=False,
        talker_do_sample=False,
        talker_min_new_tokens=4,
        talker_max_new_tokens=4,
    )
    assert text.shape[1] > ids.shape[1]
    assert sound.numel() > 1000
    assert sound.isfinite().all()
    assert sound.abs().max() > 0


def test_command_line(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "make_qwen3_omni.py")]
    arguments = ["model", "--layers", "1", "--thinker-layers", "2", "--experts", "8", "--dtype", "bfloat16"]
    subprocess.run([*script, *arguments], cwd=tmp_path, check=True, capture_output=True)
    headers = checkpoint_headers(tmp_path / "model")
    assert headers["talker.model.layers.0.mlp.gate.weight"] == ("BF16", (8, 64))
    assert not any(name.startswith("talker.model.layers.1.") for name in headers)
    with safe_open(next((tmp_path / "model").glob("*.safetensors")), "pt") as shard:
        assert all(shard.get_tensor(name).isfinite().all() for name in shard.keys())  # noqa: SIM118


@pytest.mark.parametrize("arguments", [["--experts", "7"], ["--layers", "0"], ["--thinker-layers", "1"]])
def test_impossible_sizes(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_qwen3_omni.main([str(tmp_path / "model"), *arguments])
    assert caught.value.code == 2
    assert "needed" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(SystemExit, match="already there and not empty"):
        write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_full_size_plan_in_seconds_and_without_memory(tmp_path: Path) -> None:
    """68 sites, within 2 GiB, and 30 s of processor time: twice what it takes on a machine that does nothing else."""
    screen = os.open(tmp_path / "screen", os.O_WRONLY | os.O_CREAT, 0o600)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, str(ROOT / "examples" / "full_size_plan.py")],
        {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1"},
        file_actions=[(os.POSIX_SPAWN_DUP2, screen, 1)],
    )
    _, status, usage = os.wait4(pid, 0)
    os.close(screen)
    assert os.waitstatus_to_exitcode(status) == 0
    shown = (tmp_path / "screen").read_text()
    assert "68 to replace, 0 to keep, 0 missed, 0 refused" in shown
    assert "talker.model.layers.{0..19}.mlp" in shown
    assert "thinker.model.layers.{0..47}.mlp" in shown
    assert usage.ru_utime + usage.ru_stime < 30
    assert usage.ru_maxrss < 2 * 1024 * 1024  # in KiB
