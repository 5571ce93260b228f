"""Which class a checkpoint's config names: transformers' own, or one of trusted code that comes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_surgery.errors import ModelError
from moe_surgery.models.checkpoint import CONFIG
from moe_surgery.models.quantisation import Quantisation

_UNTRUSTED = "the model's code comes with it and runs only with trust_remote_code (--trust-remote-code)"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's directory on this machine and its raw config."""

    name: str
    directory: Path
    config: dict[str, Any]
    trust_remote_code: bool
    quantisation: Quantisation | None = None


def model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The class that the checkpoint's config names, and the config as transformers' object.

    Where a checkpoint's own code is trusted, it is that code that runs, also where transformers knows the name. A name
    that transformers doesn't know is found by the model's type, as its Auto classes do; but of code that comes along
    only where it is the same name, spelled otherwise.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedModel

    path, raw, trust = checkpoint.directory / CONFIG, checkpoint.config, checkpoint.trust_remote_code
    own = raw.get("auto_map")
    if trust and isinstance(own, dict) and any("AutoModel" in key for key in own):
        return _remote_class(checkpoint)
    names, model_type = raw.get("architectures") or [], raw.get("model_type")
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    typed = isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING
    if not typed and (not known or model_type is not None):
        version = transformers.__version__
        if own:
            raise ModelError(f"{path}: auto_map: {_UNTRUSTED}")
        if names and not known:
            raise ModelError(f"{path}: architectures: transformers {version} has no class {names[0]!r}")
        if model_type is None:
            raise ModelError(f"{path}: neither architectures nor model_type says what the model is")
        raise ModelError(f"{path}: model_type: transformers {version} doesn't know {model_type!r}")
    if model_type is not None:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    else:
        config = kind.config_class.from_pretrained(checkpoint.directory, local_files_only=True)  # type: ignore[union-attr]
    found = kind if known else _class_by_type(config, names[0] if names else "")
    if not known and own and found is not None and _spelled(found.__name__) != _spelled(str(*names[:1])):
        raise ModelError(f"{path}: auto_map: {_UNTRUSTED}")
    if found is None:
        missing = f"transformers has no class {names[0]!r}" if names else "architectures is missing"
        raise ModelError(f"{path}: {missing}, and model_type {model_type!r} names no language model")
    return found, config


def _spelled(name: str) -> str:
    """A class's name without what makers and transformers write differently: capitals and underscores."""
    return name.replace("_", "").lower()


def _class_by_type(config: Any, name: str) -> Any:
    """The class that an Auto class has for a config; the one that does what a class called ``name`` is to do."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM]
    if name.endswith("ForConditionalGeneration"):
        kinds.sort(key=lambda kind: kind is AutoModelForCausalLM)
    if name.endswith("Model"):
        kinds.insert(0, AutoModel)
    return next((kind._model_mapping[type(config)] for kind in kinds if type(config) in kind._model_mapping), None)


def _remote_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The class that ``auto_map`` points at, in code that lies with the checkpoint."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = checkpoint.config["auto_map"]
    models = [key for key in sorted(places, key=lambda key: key != "AutoModelForCausalLM") if "AutoModel" in key]
    kind: Any = get_class_from_dynamic_module(places[models[0]], str(checkpoint.directory), local_files_only=True)
    if "AutoConfig" in places:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=True, local_files_only=True)
    else:
        config = kind.config_class.from_pretrained(checkpoint.directory, local_files_only=True)
    return kind, config
