"""Writes a checkpoint anew with some of its matrices quantised, by each format's definition and published names.

    python tests/quantised_checkpoint.py SOURCE FOLDER FORMAT [--parts experts shared attention]

SOURCE has one 2-D tensor for each projection, as ``examples/engine/make_checkpoint.py`` writes them. No tool of the
field's is needed: values are rounded to the nearest, scales are those of the greatest magnitude.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS: dict[str, tuple[str, ...]] = {
    "experts": (".mlp.experts.",),
    "shared": (".mlp.shared_expert.", ".mlp.shared_experts."),
    "attention": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.", ".self_attn.o_proj."),
}
F8, F8_MOST = torch.float8_e4m3fn, 448.0
INPUT_SCALE = 0.05  # static: the greatest activation that is told apart is 22 then
F4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, by its lower three bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Quantise = Callable[[Tensor, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: its tensors by suffix, and the config; ``ignored`` is the key of what isn't stored so."""

    quantise: Quantise
    config: Callable[[int], dict[str, Any]]
    ignored: str | None


def _scaled(weight: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    scale = (most / F8_MOST).clamp_min(1e-12)
    return (weight / scale).clamp(-F8_MOST, F8_MOST).to(F8), scale


def _fp8_block(weight: Tensor, group: int) -> dict[str, Tensor]:
    rows, columns = weight.shape
    padded = weight.new_zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    most = padded.abs().view(padded.shape[0] // 128, 128, -1, 128).amax((1, 3))
    scale = (most / F8_MOST).clamp_min(1e-12)
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return {"weight": (weight / wide).clamp(-F8_MOST, F8_MOST).to(F8), "weight_scale_inv": scale}


def _fp8_tensor(weight: Tensor, group: int) -> dict[str, Tensor]:
    stored, scale = _scaled(weight, weight.abs().amax())
    return {"weight": stored, "weight_scale": scale}


def _fp8_static(weight: Tensor, group: int) -> dict[str, Tensor]:
    return _fp8_tensor(weight, group) | {"input_scale": torch.tensor(INPUT_SCALE)}


def _fp8_channel(weight: Tensor, group: int) -> dict[str, Tensor]:
    stored, scale = _scaled(weight, weight.abs().amax(1, keepdim=True))
    return {"weight": stored, "weight_scale": scale}


def _int8_channel(weight: Tensor, group: int) -> dict[str, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    return {"weight": (weight / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Values of -8 to 7 [N, K], and scales [N, K / group] in bfloat16."""
    parts = weight.unflatten(1, (-1, group))
    scale = (parts.abs().amax(-1) / 7).clamp_min(1e-8).bfloat16()
    return (parts / scale.float()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int32), scale


def packed(nibbles: Tensor, order: Iterable[int] = range(8)) -> Tensor:
    """Numbers of 0 to 15 [N, K] to int32 [N, K / 8], the one at ``order[i]`` in the i-th four bits from below."""
    eight = nibbles.to(torch.int64).unflatten(1, (-1, 8))
    words = sum(eight[..., place] << (4 * at) for at, place in enumerate(order))
    assert isinstance(words, Tensor)
    return (words & 0xFFFFFFFF).where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def _ct_int4(weight: Tensor, group: int) -> dict[str, Tensor]:
    values, scale = _int4(weight, group)
    return {"weight_packed": packed(values + 8), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def _gptq(weight: Tensor, group: int) -> dict[str, Tensor]:
    values, scale = _int4(weight, group)
    zeros = torch.full((scale.shape[1], len(weight) // 8), 0x77777777, dtype=torch.int32)  # one less than the zero, 8
    return {
        "qweight": packed(values + 8).T.contiguous(),
        "scales": scale.T.contiguous().half(),
        "qzeros": zeros,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }


def _awq(weight: Tensor, group: int) -> dict[str, Tensor]:
    values, scale = _int4(weight, group)
    zeros = torch.full((scale.shape[1], len(weight)), 8)
    return {
        "qweight": packed((values + 8).T, _AWQ_ORDER),
        "scales": scale.T.contiguous().half(),
        "qzeros": packed(zeros, _AWQ_ORDER),
    }


def _f4(scaled: Tensor) -> Tensor:
    """Numbers [N, K] to the nearest of e2m1, two in a byte [N, K / 2], the first one below."""
    values = torch.tensor(F4_VALUES, device=scaled.device)
    bits = (scaled.abs()[..., None] - values).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return bits[:, ::2] | bits[:, 1::2] << 4


def _mxfp4(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Groups of 32 with a power of two each, stored as its exponent and 127."""
    parts = weight.unflatten(1, (-1, 32))
    exponent = (parts.abs().amax(-1) / F4_VALUES[-1]).log2().ceil()
    return {
        "weight_packed": _f4((parts / exponent.exp2()[..., None]).flatten(1)),
        "weight_scale": (exponent + 127).to(torch.uint8),
    }


def _nvfp4(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Groups of 16 with a scale in e4m3 each; the one of the whole matrix is that of a greatest weight of 1, so that
    matrices which are merged have it in common."""
    whole = F8_MOST * F4_VALUES[-1]
    parts = weight.unflatten(1, (-1, 16))
    scale = (parts.abs().amax(-1) / F4_VALUES[-1] * whole).clamp(2**-6, F8_MOST).to(F8)
    return {
        "weight_packed": _f4((parts / (scale.float() / whole)[..., None]).flatten(1)),
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([whole]),
        "input_global_scale": torch.tensor([1 / INPUT_SCALE]),
    }


def _ct(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Callable[[int], dict[str, Any]]:
    def config(group: int) -> dict[str, Any]:
        mine = {"group_size": group, **weights} if weights["strategy"] == "group" else weights
        both = {"targets": ["Linear"], "weights": mine, "input_activations": inputs}
        return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": both}}

    return config


def _values(bits: int, kind: str, strategy: str, *, dynamic: bool | str = False, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic, **more}


def _fp8(scheme: str, **more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda group: {"quant_method": "fp8", "activation_scheme": scheme, **more}


FORMATS: dict[str, Format] = {
    "fp8_block": Format(_fp8_block, _fp8("dynamic", weight_block_size=[128, 128]), "modules_to_not_convert"),
    "fp8_tensor": Format(_fp8_tensor, _fp8("dynamic"), "modules_to_not_convert"),
    "fp8_static": Format(_fp8_static, _fp8("static"), "modules_to_not_convert"),
    "ct_fp8_channel": Format(
        _fp8_channel,
        _ct("float-quantized", _values(8, "float", "channel"), _values(8, "float", "token", dynamic=True)),
        "ignore",
    ),
    "ct_int4": Format(_ct_int4, _ct("pack-quantized", _values(4, "int", "group"), None), "ignore"),
    "ct_mxfp4": Format(
        _mxfp4, _ct("mxfp4-pack-quantized", _values(4, "float", "group", group_size=32), None), "ignore"
    ),
    "ct_nvfp4": Format(
        _nvfp4,
        _ct(
            "nvfp4-pack-quantized",
            _values(4, "float", "tensor_group", group_size=16),
            _values(4, "float", "tensor_group", group_size=16, dynamic="local"),
        ),
        "ignore",
    ),
    "ct_int8": Format(
        _int8_channel,
        _ct("int-quantized", _values(8, "int", "channel"), _values(8, "int", "token", dynamic=True)),
        "ignore",
    ),
    "gptq": Format(
        _gptq,
        lambda group: {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True},
        None,
    ),
    "awq": Format(
        _awq,
        lambda group: {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
        "modules_to_not_convert",
    ),
    "modelopt_fp8": Format(
        _fp8_static,
        lambda group: {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}},
        "ignore",
    ),
}


def write(
    source: Path, folder: Path, kind: str, parts: Iterable[str] = ("experts", "shared"), *, group: int = 32
) -> None:
    """Write what lies in ``source`` into ``folder`` with the matrices of ``parts`` stored as format ``kind``."""
    how, wanted = FORMATS[kind], tuple(name for part in parts for name in PARTS[part])
    folder.mkdir(parents=True)
    places, ignored = {}, []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for file in sorted(source.glob("*.safetensors")):
        out: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if tensor.ndim == 2 and name.endswith("_proj.weight") and any(part in name for part in wanted):
                stored = how.quantise(tensor.to(device, torch.float32), group)
                out |= {f"{module}.{suffix}": value.cpu().contiguous() for suffix, value in stored.items()}
            else:
                out[name] = tensor
                if tensor.ndim == 2 and "embed_tokens" not in name:
                    ignored.append(module)
        save_file(out, folder / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(out, file.name)
    for other in source.glob("*.json"):
        if "index" not in other.name:
            shutil.copy(other, folder)
    if len(set(places.values())) > 1:
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = how.config(group) | ({how.ignored: ignored} if how.ignored else {})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def without(folder: Path, name: str, out: Path) -> Path:
    """The checkpoint without one of its tensors."""
    return but(folder, out, lambda tensors: tensors.pop(name, None))


def but(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The checkpoint after ``change`` of the tensors of each of its files."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["experts", "shared"])
    parser.add_argument("--group", type=int, default=32)
    arguments = parser.parse_args()
    write(arguments.source, arguments.folder, arguments.format, arguments.parts, group=arguments.group)


if __name__ == "__main__":
    main()
