"""How a checkpoint's weights are quantised, told from its config alone: by which scheme, and which modules aren't."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_surgery.models.checkpoint import CONFIG, read_json

FIELD = "quantization_config"
MODELOPT = "hf_quant_config.json"
_EXCLUDED = ("ignore", "ignored_layers", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules")
_SAYING_OF_WHAT = "compressed-tensors", "modelopt"
"""Methods that may be of something else than weights, and say so."""
_TYPES = {"float": "FP", "int": "int"}


@dataclass(frozen=True)
class Quantisation:
    """``scheme`` in words; ``where`` it is said; ``excluded`` are patterns of modules that are kept as they are."""

    scheme: str
    where: str
    excluded: tuple[str, ...] = ()

    def covers(self, path: str) -> bool:
        """Whether the module at ``path`` is quantised, as far as its name says."""
        return not any(_fits(pattern, path) for pattern in self.excluded)

    @property
    def advice(self) -> str:
        """What to do about it in a plain model."""
        return "convert the checkpoint to bfloat16 first, or serve it as it is in an engine that has kernels for it"


def quantisation_of(directory: Path, config: Mapping[str, Any]) -> Quantisation | None:
    """What ``config`` and a file beside it say; None if nothing is quantised."""
    for where, data in _found(config):
        return Quantisation(_scheme(data), f"{CONFIG}: {where}", tuple(_excluded(data)))
    if (directory / MODELOPT).is_file():
        beside = read_json(directory / MODELOPT).get("quantization")
        if isinstance(beside, dict) and beside.get("quant_algo"):
            return Quantisation(_scheme(beside), f"{MODELOPT}: quantization", tuple(_excluded(beside)))
    return None


def _found(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in config.items():
        if isinstance(value, dict):
            if key == FIELD and value and not _of_cache_alone(value):
                yield f"{within}{key}", value
            else:
                yield from _found(value, f"{within}{key}.")


def _of_cache_alone(data: Mapping[str, Any]) -> bool:
    """Whether a scheme is for what attention keeps of keys and values, and for no weights."""
    caches = data.get("kv_cache_scheme"), data.get("kv_cache_quant_algo")
    weights = data.get("config_groups"), data.get("quant_algo"), data.get("quantized_layers")
    return data.get("quant_method") in _SAYING_OF_WHAT and any(caches) and not any(weights)


def _scheme(data: Mapping[str, Any]) -> str:
    """The scheme in words, that of the experts where they have one of their own."""
    method = str(data.get("quant_method") or data.get("quant_algo") or "unknown").lower()
    algorithm = data.get("moe_quant_algo") or data.get("quant_algo")
    layers = data.get("quantized_layers")
    if algorithm == "MIXED_PRECISION" and isinstance(layers, dict):
        found = {name: str(layer.get("quant_algo")) for name, layer in layers.items() if isinstance(layer, dict)}
        kinds = {kind for name, kind in found.items() if "expert" in name} or set(found.values())
        return f"{' and '.join(sorted(kinds))} (ModelOpt, mixed)"
    if algorithm and algorithm != "MIXED_PRECISION":
        groups = [_weights(group) for group in _groups(data)]
        return f"{algorithm} (ModelOpt{next(filter(None, map(_size, [data, *groups])), '')})"
    if method == "fp8":
        block = data.get("weight_block_size")
        scales = f"blocks of {'×'.join(map(str, block))}" if isinstance(block, list) else "one scale for each tensor"
        return f"FP8 ({data.get('fmt', 'e4m3')}, {scales})"
    if method == "compressed-tensors":
        schemes = {_group(group) for group in _groups(data)}
        return f"{' and '.join(sorted(schemes)) or data.get('format', 'packed')} (compressed-tensors)"
    bits = data.get("bits") or data.get("w_bit") or (4 if data.get("load_in_4bit") else None)
    return f"{method.upper()}" + (f" int{bits}" if bits else "") + (f" ({_size(data)[2:]})" if _size(data) else "")


def _groups(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = data.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else {}


def _group(group: Mapping[str, Any]) -> str:
    weights = _weights(group)
    kind = f"{_TYPES.get(str(weights.get('type')), '')}{weights.get('num_bits', '?')}"
    return f"{kind}, scales by {weights.get('strategy', 'tensor')}{_size(weights)}"


def _size(data: Mapping[str, Any]) -> str:
    size = data.get("group_size") or data.get("q_group_size")
    return f", groups of {size}" if isinstance(size, int) and size > 0 else ""


def _excluded(data: Mapping[str, Any]) -> Iterable[str]:
    for key in _EXCLUDED:
        value = data.get(key)
        if isinstance(value, list):
            yield from (str(item) for item in value)


def _fits(pattern: str, path: str) -> bool:
    """Whether a pattern of modules names ``path``: a regular expression, a glob, or the name of a module or its end."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    if "*" in pattern:
        return any(fnmatchcase(path, glob) for glob in (pattern, f"{pattern}.*"))
    return f".{pattern}." in f".{path}."
