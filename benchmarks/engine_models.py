"""vLLM engines of models that vLLM has fused itself, at their published sizes: without surgery, and folded anew.

    python benchmarks/engine_models.py [NAME ...] [--target auto]

Each is a model of transformers' with random weights in bfloat16, of the published sizes but for the number of layers
and the vocabulary, which is none of what is timed. Two engines stand at a time, each in a process of its own, and are
asked in turns, as in ``engine.py``; every block of one of them is replaced and the first and the last are proven.
"device" is the time between CUDA events around the model's forward. Writes results/<machine>-engine_models.json; rows
of models that aren't named stay as they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from command import command  # noqa: E402
from gpu_machine import describe, machine_name  # noqa: E402

from moe_surgery.engine.timing.asking import Engine, Job, measure  # noqa: E402
from moe_surgery.engine.timing.both_engines import sizes  # noqa: E402
from moe_surgery.timing.blocks import spread  # noqa: E402

DECODE, PREFILL = (1, 8, 32, 128), (512, 2048, 8192)
SHORT = {"vocab_size": 4096, "max_position_embeddings": 32768, "tie_word_embeddings": False, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Model:
    """A published model: its class's folder and config in transformers, with ``layers`` of those it has."""

    config_class: str
    layers: int
    sizes: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "Qwen3-30B-A3B": Model(
        "Qwen3MoeConfig",
        8,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
    ),
    "Qwen3-Next-80B-A3B": Model(
        "Qwen3NextConfig",
        4,
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
        },
    ),
    "Qwen2-57B-A14B": Model(
        "Qwen2MoeConfig",
        3,
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "norm_topk_prob": False,
        },
    ),
    "Mixtral-8x7B": Model(
        "MixtralConfig",
        3,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "Qwen1.5-MoE-A2.7B": Model(
        "Qwen2MoeConfig",
        8,
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
        },
    ),
    "GLM-4.5-Air": Model(
        "Glm4MoeConfig",
        3,
        {
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
        },
    ),
    "DeepSeek-V2-Lite": Model(
        "DeepseekV2Config",
        6,
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
}


def write(model: Model, folder: Path) -> None:
    """A checkpoint with random weights that about keep the scale of their input."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, model.config_class)(num_hidden_layers=model.layers, **SHORT, **model.sizes)
    with torch.device("cuda"):
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    built.get_input_embeddings().weight.data.normal_()
    built.config.architectures = [type(built).__name__]
    built.save_pretrained(folder)
    # What published configs of the class have, vLLM reads, and transformers doesn't write.
    file = folder / "config.json"
    told = {key: value for key, value in model.sizes.items() if value is not None}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | told), encoding="utf-8")


def rows_of(name: str, target: str, folder: Path) -> list[dict[str, Any]]:
    write(MODELS[name], folder / "model")
    torch.cuda.empty_cache()
    job = Job(str(folder / "model"), DECODE, PREFILL, dtype="bfloat16")
    with ExitStack() as ends:
        begun = time.monotonic()
        engines = {"without": Engine(job, folder / "without")}
        ends.callback(engines["without"].end)
        engines["folded"] = Engine(replace(job, run=str(folder / "run"), target=target), folder / "folded")
        ends.callback(engines["folded"].end)
        report = engines["folded"].report()
        engines["without"].report()
        assert report is not None
        margins = _margins(report)
        print(f"{name}: {len(report['sites'])} blocks, margins {margins}, {time.monotonic() - begun:.0f} s", flush=True)
        return [
            {
                "model": name,
                "layers": MODELS[name].layers,
                "target": target,
                "surgery_seconds": report["seconds"],
                **row,
            }
            for row in _timed(engines, job)
        ]


def _margins(report: dict[str, Any]) -> list[float]:
    """Of the blocks that were proven. Ends the program if a block was not folded."""
    wrong = [site for site in report["sites"] if site["outcome"] != "replaced" or site["target"] != "folded"]
    if wrong:
        raise SystemExit(f"{wrong[0]['path']} is {wrong[0]['outcome']}: {wrong[0]['reason']}")
    return [round(site["proof"]["margin"], 1) for site in report["sites"] if site.get("proof")]


def _timed(engines: dict[str, Engine], job: Job) -> list[dict[str, Any]]:
    found = []
    for what, sequences, tokens in sizes(job):
        old, new = measure(list(engines.values()), what, sequences, tokens)
        medians = [statistics.median(each.device) for each in (old, new)]
        row = {
            "mode": what.split()[0],
            "sequences": sequences,
            "tokens": tokens,
            "without_us": round(1e6 * medians[0], 1),
            "folded_us": round(1e6 * medians[1], 1),
            "ratio": round(medians[0] / medians[1], 3),
            "spread": round(spread(old.device, new.device), 3),
            "calls": min(old.calls, new.calls),
        }
        found.append(row)
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--target", default="auto", choices=("auto", "folded"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    names = arguments.names or list(MODELS)
    path = arguments.out / f"{machine_name()}-engine_models.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    found = [row for row in before if row["model"] not in names]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found += rows_of(name, arguments.target, Path(folder))
        arguments.out.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({**describe(), "command": command(), "rows": found}, indent=1) + "\n", encoding="utf-8"
        )
    print(path)


if __name__ == "__main__":
    main()
