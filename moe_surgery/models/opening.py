"""Opening a model by name: a directory or a hub id, on the meta device from its config, or with its weights.

Only safetensors are read, and code that a checkpoint brings along runs only if asked for. transformers is imported
when a model is opened, not when this module is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import ModelError, UsageError
from moe_surgery.installed.imports import uncollected
from moe_surgery.models.checkpoint import (
    CONFIG,
    INDEX,
    Header,
    checkpoint_headers,
    read_config,
    refuse_pickles,
    uneven_expert,
)
from moe_surgery.models.classes import Checkpoint, model_class
from moe_surgery.models.config_faults import field_of, fields, ill_typed, no_counts, no_objects
from moe_surgery.models.dtype_device import here, torch_dtype
from moe_surgery.models.loading import Read, quiet_bars, told
from moe_surgery.models.quantisation import FIELD, MODELOPT, Quantisation, quantisation_of
from moe_surgery.models.text import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch
    from torch import nn

_LONGEST_REASON = 300
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIG_FILES = ("config.json", "generation_config.json", MODELOPT, INDEX)
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, eq=False)
class Opened:
    """A model and what it was opened from. ``config`` is ``config.json`` as written, without class defaults.

    ``quantisation`` says how the checkpoint's weights are quantised; the module then is what it was before they were.
    """

    name: str
    module: nn.Module
    config: dict[str, Any]
    directory: Path
    quantisation: Quantisation | None = None


def open_meta(model: str, *, trust_remote_code: bool = False, dtype: str | None = None) -> Opened:
    """Build a model on the meta device from its config alone, in evaluation mode.

    ``model`` is a directory with at least ``config.json``, or a hub id. No weight is read, allocated or initialised.
    ``dtype`` is None for the checkpoint's own.
    Raises :class:`ModelError` naming the file or the field that stands in the way.
    """
    with uncollected():
        import torch
        from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    checkpoint = _find(model, trust_remote_code, weights=False)
    wanted = _dtype(checkpoint) if dtype is None else torch_dtype(dtype)
    with _model_errors(checkpoint.directory / CONFIG, config=checkpoint.config), uncollected():
        kind, config = model_class(checkpoint)
        with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
            module = kind._from_config(_unquantised(config), dtype=wanted)
    return Opened(checkpoint.name, module.eval(), checkpoint.config, checkpoint.directory, checkpoint.quantisation)


def load_model(
    model: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_read: Read | None = None,
) -> Opened:
    """Load a model with its weights, in evaluation mode. ``dtype`` is None for the checkpoint's own.

    ``on_read`` is told the bytes that were read, those there are, and the parameter that comes next.

    Raises :class:`ModelError` if a weight is missing, left over or of the wrong shape: a model that lacks an expert
    would otherwise run on random numbers without a word.
    """
    checkpoint = _find(model, trust_remote_code, weights=True)
    headers = checkpoint_headers(checkpoint.directory)
    wanted = _dtype(checkpoint) if dtype is None else torch_dtype(dtype)
    place = here(device)
    with _model_errors(checkpoint.directory / CONFIG, config=checkpoint.config):
        kind, config = model_class(checkpoint)
    with _model_errors(checkpoint.directory, headers, checkpoint.config), quiet_bars(), told(headers, on_read):
        module, info = kind.from_pretrained(
            checkpoint.directory,
            config=_unquantised(config),  # its cache may be quantised, which is no matter here
            dtype=wanted,
            use_safetensors=True,
            local_files_only=True,
            # Without this the names of misshapen tensors are only logged; _check_loaded refuses them.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        _check_loaded(checkpoint, info)
        module = module.to(place)
    return Opened(checkpoint.name, module.eval(), checkpoint.config, checkpoint.directory)


def _find(model: str, trust_remote_code: bool, *, weights: bool) -> Checkpoint:
    directory = Path(model)
    if not model:
        raise ModelError("no model is named")
    if os.path.isdir(model):
        name = directory.resolve().name
    elif os.path.exists(model):
        raise ModelError(f"{model}: a file; a model is a directory with {CONFIG}, or a hub id")
    elif not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ModelError(f"{model}: no such directory")
    else:
        name, directory = model, _download(model, trust_remote_code, weights)
    config = read_config(directory)
    refuse_pickles(directory)
    found = quantisation_of(directory, config)
    if found is not None and weights:
        raise ModelError(f"{directory}/{found.where}: its weights are {found.scheme}; {found.advice}")
    return Checkpoint(name, directory, config, trust_remote_code, found)


def _unquantised(config: Any) -> Any:
    """The config of the same model before it was quantised."""
    for inner in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        if hasattr(inner, FIELD):
            delattr(inner, FIELD)
    return config


def _download(model: str, trust_remote_code: bool, weights: bool) -> Path:
    """The directory of a hub id's files in the local cache, fetched if need be; never a pickle."""
    from huggingface_hub import snapshot_download

    patterns = [
        *_CONFIG_FILES,
        *(["*.safetensors", *TOKENIZER_FILES] if weights else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        # The hub client raises several unrelated families of errors (HTTP, validation, missing cache entries).
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.removeprefix("Got: ")
        raise ModelError(f"{model}: no such directory, and it can't be fetched from the hub: {reason}") from error


def _stated(config: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """Every ``key`` that isn't null in a config and in the configs inside it, outermost first, with its path."""
    for path, name, value in fields(config):
        if name == key and value is not None and all(part.endswith("_config") for part in path.split(".")[:-1]):
            yield path, value


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, else the one of the weights, else float32 as in transformers.

    The outermost statement counts; it may be called ``dtype`` or, in older checkpoints, ``torch_dtype``.
    """
    for key in ("dtype", "torch_dtype"):
        for path, value in _stated(checkpoint.config, key):
            try:
                return torch_dtype(value)
            except UsageError as error:
                raise ModelError(f"{checkpoint.directory / CONFIG}: {path}: {error}") from None
    try:
        headers = checkpoint_headers(checkpoint.directory, complete=False)
    except ModelError:
        headers = {}
    stated = [_SAFETENSORS_DTYPES[dtype] for dtype, _ in headers.values() if dtype in _SAFETENSORS_DTYPES]
    return torch_dtype(stated[0] if stated else "float32")


def _check_loaded(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raise unless every parameter got a tensor of its shape, and every tensor a parameter."""
    found = []
    for key, words in (
        ("missing_keys", "missing from the checkpoint"),
        ("unexpected_keys", "in the checkpoint, but not in the model"),
        ("mismatched_keys", "of another shape in the checkpoint"),
        ("error_msgs", "with errors"),
    ):
        names = sorted(_told(entry) for entry in info.get(key) or ())
        if names:
            found.append(f"{len(names)} {words}, first {names[0]}")
    if found:
        raise ModelError(f"{checkpoint.directory}: weights don't fit the model: " + "; ".join(found))


def _told(entry: object) -> str:
    if not isinstance(entry, tuple):
        return str(entry)
    name, found, wanted = entry
    return f"{name}: {list(found)} for {list(wanted)}"


@contextmanager
def _model_errors(
    where: Path, headers: Header | None = None, config: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turn whatever transformers raises over a config or a checkpoint into one error naming the file or directory.

    It stacks experts while loading and doesn't say which one it missed, or can't stack, so that is looked up in the
    headers; so is in the config which of its fields has a value that it has no entry for, such as an activation.
    """
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch has no class of error for that on a CPU
            raise MemoryError(" ".join(str(error).split())) from error
        # A bad field surfaces as a KeyError, AttributeError, ValueError or validation error, depending on the model.
        # torch lets stack frames follow, and transformers advice.
        # transformers wraps what is wrong with a field once more.
        told = error.__cause__ if type(error).__name__.startswith("StrictDataclass") and error.__cause__ else error
        text = " ".join(str(told).partition("Exception raised from")[0].split())
        reason = shorten(text, _LONGEST_REASON, placeholder=" …") or type(told).__name__
        uneven = uneven_expert(headers or {})
        hint = f"{uneven}: " if uneven else ""
        if isinstance(error, KeyError) and (field := field_of(config or {}, error.args[0])) is not None:
            raise ModelError(f"{where}: {field} is {error.args[0]!r}, which transformers has nothing for") from error
        if (field := ill_typed(text, config or {})) is not None:
            raise ModelError(f"{where}: {shorten(field, _LONGEST_REASON, placeholder=' …')}") from error
        if isinstance(error, ZeroDivisionError) or "negative dimension" in reason:
            hint += no_counts(config or {}, zero=isinstance(error, ZeroDivisionError))
        elif isinstance(error, AttributeError | TypeError):
            hint += no_objects(config or {})
        if isinstance(error, ImportError):
            reason += " (moe-surgery doctor says whether the installation is sound)"
        raise ModelError(f"{where}: {hint}{type(told).__name__}: {reason}") from error
