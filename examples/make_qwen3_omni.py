"""Write a small Qwen3-Omni checkpoint in the Hugging Face format, with random weights.

    python examples/make_qwen3_omni.py DIR [--layers 20] [--experts 16] [--dtype float32] [--seed 0]

The structure is that of Qwen3-Omni-30B-A3B: a thinker with audio and vision towers, a talker with code predictor, and
code2wav; the published tensor names (one 2-D tensor per expert and projection), and sharded safetensors with an index.
Only the sizes are small.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_omni_config import SMALL, Sizes, omni_config

if TYPE_CHECKING:
    import torch


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights under which every expert matters.

    Matrices keep the scale of their input (standard deviation ``1/sqrt(fan_in)``), except that a routed expert's
    output is weighted by about 1/k, so its matrices are a quarter larger: zeroing one expert must change the logits,
    and rounding must not be blown up from layer to layer.
    Vectors (norm weights, biases, layer scales) stay as the model class sets them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter[0].numel() if ".experts." not in name else parameter.shape[-1]
            scale = 1.0 if "embed" in name else fan_in**-0.5 * (1.25 if ".experts." in name else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def write(directory: Path, sizes: Sizes = SMALL, *, dtype: str = "float32", seed: int = 0) -> None:
    """Write the checkpoint. ``config.json`` comes last: a directory that has it is complete."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SystemExit(f"{directory}: already there and not empty")
    import torch
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    config = omni_config(sizes, dtype)
    model = Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**config))
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="2MB")
    # save_pretrained wrote every default of the config classes too; the published file has no such fields.
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a small Qwen3-Omni checkpoint with random weights.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=SMALL.talker.layers, help="talker layers (default %(default)s)")
    parser.add_argument("--thinker-layers", type=int, default=SMALL.thinker.layers, help="default %(default)s")
    parser.add_argument("--experts", type=int, default=SMALL.talker.experts, help="per block (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.layers < 1 or given.thinker_layers < SMALL.accept_layer:
        parser.error(f"at least 1 talker and {SMALL.accept_layer} thinker layers are needed")
    if given.experts < SMALL.thinker.top_k:
        parser.error(f"at least {SMALL.thinker.top_k} experts are needed: the thinker routes to that many")
    sizes = replace(
        SMALL,
        thinker=replace(SMALL.thinker, layers=given.thinker_layers, experts=given.experts),
        talker=replace(SMALL.talker, layers=given.layers, experts=given.experts),
    )
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of what the published config has too
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    write(given.directory, sizes, dtype=given.dtype, seed=given.seed)
    shards = sorted(given.directory.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{given.directory}: Qwen3-Omni, {size / 1e6:.1f} MB in {len(shards)} shards", file=sys.stderr)


if __name__ == "__main__":
    main()
