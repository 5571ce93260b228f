"""Every sparse-MoE family of transformers as a tiny random model, built from its real config and modeling classes.

What to build is in ``families.toml``; nothing here knows a family by name.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT = "default"
_TOKENS = 12


@dataclass(frozen=True)
class Family:
    """One entry of ``families.toml``: a model class, its config's fields, and other settings of them, by name."""

    name: str
    model_class: str
    config: Mapping[str, Any]
    inputs: str = "ids"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The family's folder in transformers."""
        return self.name.partition("#")[0]

    def setting(self, name: str) -> Mapping[str, Any]:
        """The config fields of a setting. Raises ``UsageError`` naming those there are."""
        if name == DEFAULT:
            return {}
        if name not in self.settings:
            known = ", ".join((DEFAULT, *self.settings))
            raise UsageError(f"{self.name} has no setting {name!r}; it has {known}")
        return self.settings[name]


@cache
def families() -> Mapping[str, Family]:
    """All families, by name, in alphabetical order.

    Returns:
        Name → family, with the ``settings`` that ``build`` takes.

    Examples:
        >>> "top4" in moe_surgery.testing.families()["qwen2_moe"].settings
        True
    """
    data = _without_none(_data())
    common = data.pop("common")
    del data["tiny"]
    return {name: _family(name, entry, common) for name, entry in data.items()}


def family(name: str) -> Family:
    """The family called ``name``. Raises ``UsageError`` if there is none."""
    if name not in families():
        raise UsageError(f"no family is called {name!r}; there are {', '.join(families())}")
    return families()[name]


def build(
    name: str, setting: str = DEFAULT, seed: int = 0, fields: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of a family, in float32 and evaluation mode, and the keyword arguments of one call of it.

    Weights, biases, correction biases and scales of its MoE blocks are random and large enough for each of them to
    be seen in the outputs. The same arguments give the same model.

    Args:
        name: Of a family, as ``families`` has it.
        setting: Other values of some fields of its config; "default" for none.
        seed: Of the weights and inputs.
        fields: Values of config fields instead of a setting's.

    Returns:
        The model, and inputs such as ``{"input_ids": [B, S] int64}``.

    Raises:
        UsageError: There is no such family or setting.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe", "top4")
        >>> moe_surgery.scan(model).kept[0].spec.router.top_k
        4
    """
    import torch

    from moe_surgery.testing.filling import fill

    chosen = family(name)
    fields = chosen.setting(setting) if fields is None else fields
    kind, config = _config(chosen, fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float().eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    fill(model, generator, {**chosen.config.get("shift", {}), **fields.get("shift", {})})
    return model, _INPUTS[chosen.inputs](config, generator)


def model_config(chosen: Family, fields: Mapping[str, Any] | None = None) -> Any:
    """The transformers config that ``build`` builds a family's model from, with other values of some fields.

    Fields that the config doesn't have are left out.
    """
    return _config(chosen, fields or {})[1]


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What a model computes: the tensor it returns, or else logits, last hidden state or feature maps.

    Args:
        model: A module, in evaluation mode.
        inputs: The keyword arguments of one call of it.

    Returns:
        Of the models of families: float, of shape [B, S, V or H]; feature maps [B, patches, H].

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> moe_surgery.testing.outputs(model, inputs).shape
        torch.Size([2, 12, 96])
    """
    import torch

    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    for key in ("logits", "last_hidden_state"):
        if result.get(key) is not None:
            return result[key]
    return torch.cat(result["feature_maps"], dim=-1)


@cache
def _data() -> Mapping[str, Any]:
    text = resources.files("moe_surgery.testing").joinpath("families.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _without_none(value: Any) -> Any:
    """TOML has no null; it is written "none"."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    return None if value == "none" else value


def _family(name: str, entry: Mapping[str, Any], common: Mapping[str, Any]) -> Family:
    settings = {key: common[key] for key in entry.get("common", ())} | entry.get("settings", {})
    return Family(name, entry["class"], entry.get("config", {}), entry.get("inputs", "ids"), settings)


def _config(chosen: Family, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model class and its config."""
    kind = _kind(chosen)
    return kind, kind.config_class(**_merged(config_fields(chosen), _known(chosen, kind.config_class, fields)))


def _kind(chosen: Family) -> Any:
    return getattr(import_module(f"transformers.models.{chosen.folder}.modeling_{chosen.folder}"), chosen.model_class)


def config_fields(chosen: Family) -> dict[str, Any]:
    """The fields that a family's config is made with in its default setting."""
    tiny = _known(chosen, _kind(chosen).config_class, _data()["tiny"])
    return _merged(tiny, chosen.config)


def _known(chosen: Family, config_class: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A common setting lists one meaning under many names; a family's own names must exist, as its class checks."""
    known = {entry.name for entry in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return {key: value for key, value in fields.items() if key in known or key in chosen.config}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in base.items() if key != "shift"}
    for key, value in over.items():
        held = merged.get(key)
        if key != "shift":
            merged[key] = {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _ids(config: Any, generator: Any) -> dict[str, Any]:
    import torch

    ids = torch.randint(3, config.vocab_size, (2, _TOKENS), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def _seq2seq(config: Any, generator: Any) -> dict[str, Any]:
    inputs = _ids(config, generator)
    return {**inputs, "decoder_input_ids": inputs["input_ids"].flip(1)}


def _modality(config: Any, generator: Any) -> dict[str, Any]:
    """Token ids of which some count as vision tokens, which other experts see."""
    inputs = _ids(config, generator)
    kinds = (inputs["input_ids"] % 3 == 0).int()
    return {**inputs, "moe_mm_token_type_ids": kinds}


def _embeddings(config: Any, generator: Any) -> dict[str, Any]:
    import torch

    return {"inputs_embeds": torch.randn(2, _TOKENS, config.hidden_size, generator=generator), "use_cache": False}


def _pixels(config: Any, generator: Any) -> dict[str, Any]:
    import torch

    pixels = torch.randn(config.num_experts, config.num_channels, *config.image_size, generator=generator)
    return {"pixel_values": pixels, "dataset_index": torch.arange(config.num_experts)}


_INPUTS = {"ids": _ids, "seq2seq": _seq2seq, "modality": _modality, "embeddings": _embeddings, "pixels": _pixels}
