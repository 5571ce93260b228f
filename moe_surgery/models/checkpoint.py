"""The files of a Hugging Face checkpoint directory, inspected without loading a tensor."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moe_surgery.errors import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PARTS = (
    CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", *PICKLES,
    "tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "*processor_config.json", "*.py",
)  # fmt: skip

_OF_NO_MEANING = ("transformers_version", "_name_or_path")
# The name and the size in bytes of every dtype the safetensors format knows in whole bytes.
_ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
# Far above any real header (a model of 200,000 tensors has about 25 MB); a corrupt length must not be allocated.
_LONGEST_HEADER = 100_000_000

_ADAPTER = "adapter_config.json"
_NOT_MODELS = {
    "*.gguf": ("a GGUF file, of llama.cpp", "which is not read: name the model that it was made from"),
    "model_index.json": ("a pipeline of several models", "so name the folder of one of them"),
    "params.json": ("a model in its maker's own form", "which is not read: name its conversion for transformers"),
}
"""Files that folders without ``config.json`` are known by: what each is, and what to do."""

Header = dict[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How much a tensor of a safetensors dtype takes in its file; 0 of a dtype that isn't known."""
    return _ITEM_SIZES.get(dtype, 0) * math.prod(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one error naming the file and, if it isn't JSON, the line."""
    _check_regular(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a JSON object is wanted, not {type(data).__name__}")
    return data


def _check_regular(path: Path) -> None:
    """Raise :class:`ModelError` for a pipe or a device: opening one may wait for ever. What isn't there passes."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ModelError(f"{path}: neither a file nor a link to one")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as the checkpoint has it: no default of any config class is added.

    Raises :class:`ModelError` if one of the fields that say what the model is can't say it.
    """
    if directory.is_dir() and not (directory / CONFIG).exists():
        raise ModelError(f"{directory / CONFIG}: no such file{_instead(directory)}")
    config = read_json(directory / CONFIG)
    for path in sorted(directory.glob("*.json")):  # transformers reads others
        _check_regular(path)
    names, quantisation = config.get("architectures"), config.get("quantization_config")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{directory / CONFIG}: architectures: a list of class names is wanted, not {names!r}")
    if quantisation is not None and not isinstance(quantisation, dict):
        raise ModelError(f"{directory / CONFIG}: quantization_config: an object is wanted, not {quantisation!r}")
    return config


def is_part(path: Path) -> bool:
    """Whether a file is there that by its name is the config, weights, tokenizer or code of a model."""
    return path.is_file() and any(map(path.match, _PARTS))


def _instead(directory: Path) -> str:
    """What a directory without a config holds in its place, and which model to name then; empty if nothing known."""
    if (directory / _ADAPTER).exists():
        base = read_json(directory / _ADAPTER).get("base_model_name_or_path")
        return f"; here is an adapter, so name the model that it adapts{f', {base}' if base else ''}"
    for pattern, (what, advice) in _NOT_MODELS.items():
        found = min((file.name for file in directory.glob(pattern)), default=None)
        if found is not None:
            return f"; {found} is {what}, {advice}"
    return ""


def refuse_pickles(directory: Path) -> None:
    """Refuse a directory whose only weights are pickles, which run code when they are read."""
    if any(directory.glob("*.safetensors")) or (directory / INDEX).exists():
        return
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory / pickles[0]}: pickled weights are never read, since that runs code; "
            "convert the checkpoint to safetensors"
        )


def shard_names(directory: Path) -> dict[str, str] | None:
    """Tensor name → file name from the index, or None if the checkpoint has no index."""
    if not (directory / INDEX).exists():
        return None
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{directory / INDEX}: no weight_map of tensor names to file names")
    escaping = [file for file in weight_map.values() if Path(file).name != file]
    if escaping:
        raise ModelError(f"{directory / INDEX}: {escaping[0]!r} is not a file of this directory")
    return weight_map


def checkpoint_headers(directory: str | Path, *, complete: bool = True) -> Header:
    """Name → (safetensors dtype, shape) of every tensor of a checkpoint, from the headers of its files alone.

    ``complete`` also checks that each file is as long as its header says; without it a file may end after its header.
    Raises :class:`ModelError` naming the file: no safetensors, a shard that is missing or cut short, a header that
    can't be read, a tensor in two files, or one that the index promises and its shard doesn't hold.
    """
    directory = Path(directory)
    refuse_pickles(directory)
    weight_map = shard_names(directory)
    if weight_map is None:
        files = [SINGLE] if (directory / SINGLE).exists() else []
    else:
        files = sorted(set(weight_map.values()))
    if not files:
        raise ModelError(f"{directory}: no weights: neither {SINGLE} nor {INDEX}")
    headers: Header = {}
    for file in files:
        for name, entry in _header(directory / file, complete).items():
            if name in headers:
                raise ModelError(f"{directory / file}: {name} is in another file too")
            if weight_map is not None and weight_map.get(name) != file:
                raise ModelError(f"{directory / INDEX}: {file} holds {name}, which the index doesn't say")
            headers[name] = entry
    absent = sorted(set(weight_map or ()) - set(headers))
    if absent:
        file = (weight_map or {})[absent[0]]
        raise ModelError(f"{directory / file}: {absent[0]} is missing, which {INDEX} says it holds")
    return headers


def files_of(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint. Raises :class:`ModelError` as :func:`checkpoint_headers`."""
    named = shard_names(directory) or dict.fromkeys(_header(directory / SINGLE, complete=False), SINGLE)
    return {name: directory / file for name, file in named.items()}


@dataclass(frozen=True)
class Digest:
    """What tells one checkpoint from another without reading a weight: digests of its config and its tensors' headers.

    ``tensors`` is None where there are none to read: the config alone is enough to plan.
    """

    config: str
    tensors: str | None

    def differs_in(self, other: Digest) -> str | None:
        """What the two checkpoints differ in, of what is known of both."""
        if self.config != other.config:
            return CONFIG
        both = self.tensors is not None and other.tensors is not None
        return "the names, dtypes or shapes of its tensors" if both and self.tensors != other.tensors else None


def digest(directory: Path) -> Digest:
    """The digest of a checkpoint's directory. Raises :class:`ModelError` if its config can't be read.

    Who wrote the config, and where it lay, doesn't count.
    """
    config = {key: value for key, value in read_config(directory).items() if key not in _OF_NO_MEANING}
    try:
        headers = checkpoint_headers(directory, complete=False)
    except ModelError:
        headers = {}
    return Digest(_sha(config), _sha(sorted(headers.items())) if headers else None)


def _sha(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def uneven_expert(headers: Header) -> str | None:
    """What one numbered expert of a block has otherwise than the others of that block, in words, if anything.

    That is a tensor that only others have, or one of another shape than most have.
    """
    blocks: dict[str, dict[str, dict[int, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, (_, shape) in headers.items():
        if match := re.fullmatch(r"(.*\.experts\.)(\d+)\.(.+)", name):
            blocks[match[1]][match[3]][int(match[2])] = shape
    for prefix, held in sorted(blocks.items()):
        count = max(number for shapes in held.values() for number in shapes) + 1
        for number, (suffix, shapes) in product(range(count), sorted(held.items())):
            common = Counter(shapes.values()).most_common(1)[0][0]
            if number not in shapes:
                return f"{prefix}{number}.{suffix} is missing"
            if shapes[number] != common:
                return f"{prefix}{number}.{suffix} is {list(shapes[number])}, and that of other experts {list(common)}"
    return None


def _header(path: Path, complete: bool) -> Header:
    """One file's header: 8 bytes of length (little endian), then JSON, then the tensors' bytes without gaps."""
    _check_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            text = file.read(length) if length is not None and length <= min(size, _LONGEST_HEADER) else b""
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; the checkpoint is missing this shard") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    if length is None or len(text) != length:
        raise ModelError(f"{path}: cut short or not safetensors: {size} bytes end before the header does")
    try:
        data: dict[str, Any] = json.loads(text)
        data.pop("__metadata__", None)
        entries = {name: (str(e["dtype"]), tuple(map(int, e["shape"])), e["data_offsets"]) for name, e in data.items()}
        ends = {name: (int(begin), int(end)) for name, (_, _, (begin, end)) in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ModelError(f"{path}: not safetensors: the header isn't readable") from None
    for name, (dtype, shape, _) in entries.items():
        _check_extent(path, name, dtype, shape, ends[name])
    at = 0
    for name, (begin, end) in sorted(ends.items(), key=lambda item: item[1]):
        if begin != at:
            raise ModelError(f"{path}: {name} begins at byte {begin} of the data, where byte {at} is wanted")
        at = end
    wanted = 8 + length + at
    if complete and size != wanted:
        raise ModelError(f"{path}: {size} bytes, but the header asks for {wanted}: the file is damaged or cut short")
    return {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()}


def _check_extent(path: Path, name: str, dtype: str, shape: tuple[int, ...], extent: tuple[int, int]) -> None:
    if dtype in _SUB_BYTE:
        return
    if dtype not in _ITEM_SIZES:
        raise ModelError(f"{path}: {name} is of {dtype!r}, which is no dtype of safetensors")
    size = tensor_bytes(dtype, shape)
    if extent[1] - extent[0] != size or extent[0] < 0:
        raise ModelError(f"{path}: {name} {list(shape)} {dtype} takes {size} bytes, not {extent[1] - extent[0]}")
